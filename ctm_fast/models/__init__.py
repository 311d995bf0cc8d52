"""Networks F_theta and the two model classes that every other floor talks to."""

from ctm_fast.models.checkpoint import combine_models, load_model, read_metadata, save_model
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
    "combine_models",
    "describe",
    "from_published",
    "load_model",
    "network_preset",
    "read_metadata",
    "save_model",
    "student_from_teacher",
    "to_published",
]
