"""Layers of the U-Nets. Images are [B, C, H, W]; weights are cast to the dtype of the activations they meet."""

from ctm_fast.nn.attention import SelfAttention
from ctm_fast.nn.block import UNetBlock
from ctm_fast.nn.conv import Conv2d, Linear
from ctm_fast.nn.embedding import LevelEmbedding
from ctm_fast.nn.norm import GroupNorm

__all__ = ["Conv2d", "GroupNorm", "LevelEmbedding", "Linear", "SelfAttention", "UNetBlock"]
