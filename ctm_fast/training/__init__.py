"""Training runs: configuration, data, stages, and what is kept of them."""

from ctm_fast.training.config import RunConfig
from ctm_fast.training.overrides import override
from ctm_fast.training.presets import PRESETS, preset
from ctm_fast.training.run import train

__all__ = ["PRESETS", "RunConfig", "override", "preset", "train"]
