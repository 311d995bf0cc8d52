"""The ops: tensors in, tensors out. Each has a plain PyTorch reference and fused kernels; see ``ops/_library.py``."""

from ctm_fast.ops._library import serving, use_backend, use_reference
from ctm_fast.ops.attention import attention
from ctm_fast.ops.conv3x3 import conv3x3, conv3x3_pack, conv3x3_packed, packing_pays
from ctm_fast.ops.gamma_step import gamma_step
from ctm_fast.ops.group_norm_silu import group_norm_silu
from ctm_fast.ops.noise_embed import noise_embed, noise_frequencies
from ctm_fast.ops.philox_normal import Stream, philox_normal, philox_words
from ctm_fast.ops.precond_combine import precond_combine
from ctm_fast.ops.precond_input import precond_input

__all__ = [
    "Stream",
    "attention",
    "conv3x3",
    "conv3x3_pack",
    "conv3x3_packed",
    "gamma_step",
    "group_norm_silu",
    "noise_embed",
    "noise_frequencies",
    "packing_pays",
    "philox_normal",
    "philox_words",
    "precond_combine",
    "precond_input",
    "serving",
    "use_backend",
    "use_reference",
]
