"""Networks F_theta and the two model classes that every other floor talks to."""

from ctm_fast.models.checkpoint import load_model, save_model
from ctm_fast.models.config import NetworkConfig, build_network
from ctm_fast.models.convert import from_published, to_published
from ctm_fast.models.ctm import CTM
from ctm_fast.models.edm import EDMDenoiser
from ctm_fast.models.song_unet import SongUNet

__all__ = [
    "CTM",
    "EDMDenoiser",
    "NetworkConfig",
    "SongUNet",
    "build_network",
    "from_published",
    "load_model",
    "save_model",
    "to_published",
]
