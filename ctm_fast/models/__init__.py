"""Networks F_theta and the two model classes that every other floor talks to."""

from ctm_fast.models.checkpoint import load_model, save_model
from ctm_fast.models.config import NETWORKS, NetworkConfig, network_preset
from ctm_fast.models.convert import S_INITS, from_published, student_from_teacher, to_published
from ctm_fast.models.ctm import CTM
from ctm_fast.models.describe import Description, describe
from ctm_fast.models.edm import EDMDenoiser
from ctm_fast.models.unet import ARCHITECTURES, UNet, build_network

__all__ = [
    "ARCHITECTURES",
    "CTM",
    "NETWORKS",
    "S_INITS",
    "Description",
    "EDMDenoiser",
    "NetworkConfig",
    "UNet",
    "build_network",
    "describe",
    "from_published",
    "load_model",
    "network_preset",
    "save_model",
    "student_from_teacher",
    "to_published",
]
