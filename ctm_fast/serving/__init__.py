"""Sampling in production."""

from ctm_fast.serving.sampler import Sampler, load
from ctm_fast.serving.server import QueueFullError, Server, ServerClosedError

__all__ = ["QueueFullError", "Sampler", "Server", "ServerClosedError", "load"]
