"""Layers of the U-Nets. Images are [B, C, H, W]; weights are cast to the dtype of the activations they meet."""

from ctm_fast.nn.attention import SelfAttention
from ctm_fast.nn.block import UNetBlock
from ctm_fast.nn.conv import BILINEAR, BOX, Conv2d, DownConv2d, Linear, Resampler, resample_kernel
from ctm_fast.nn.embedding import ADMEmbedding, LevelEmbedding, SongEmbedding
from ctm_fast.nn.norm import GroupNorm
from ctm_fast.nn.style import BlockStyle

__all__ = [
    "BILINEAR",
    "BOX",
    "ADMEmbedding",
    "BlockStyle",
    "Conv2d",
    "DownConv2d",
    "GroupNorm",
    "LevelEmbedding",
    "Linear",
    "Resampler",
    "SelfAttention",
    "SongEmbedding",
    "UNetBlock",
    "resample_kernel",
]
