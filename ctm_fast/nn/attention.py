"""Self-attention over the pixels of an image."""

from torch import Tensor, nn

from ctm_fast.nn.conv import Conv2d
from ctm_fast.nn.style import BlockStyle
from ctm_fast.ops import attention


class SelfAttention(nn.Module):
    """Norm, softmax attention, projection: the branch that a block adds to its output.

    x [B, C, H, W] -> [B, C, H, W]. The output channels of ``qkv`` are three-major: all of q, all of k, all of v, each
    head by head. EDM's networks interleave them; ``models.convert`` permutes those weights once.
    """

    def __init__(self, channels: int, *, style: BlockStyle, heads: int = 1) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
        self.heads = heads
        self.norm2 = style.norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1, init=style.init, scale=style.qkv_scale)
        self.proj = Conv2d(channels, channels, 1, init=style.init, scale=style.end_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(self.norm2(x)), heads=self.heads))
