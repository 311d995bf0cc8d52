"""The residual block of the DDPM++ and NCSN++ U-Nets."""

from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.nn.attention import SelfAttention
from ctm_fast.nn.conv import Conv2d, Linear, Resample
from ctm_fast.nn.norm import GroupNorm

SKIP_SCALE = 0.5**0.5


class UNetBlock(nn.Module):
    """Two 3x3 convolutions around the injection of the noise levels, optionally followed by attention.

        h = conv0(silu(norm0(x)))                          resampled before the convolution if asked for
        h = silu(norm1(h + affine(emb) + affine_s(emb_s)))
        y = (skip(x) + conv1(dropout(h))) / sqrt(2)
        y = (attention(y) + y) / sqrt(2)                   if attention

    ``forward`` is ``second(*first(...))``: training cuts the last block of a network between the two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        s_branch: bool = False,
        resample: Resample | None = None,
        attention: bool = False,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample=resample)
        self.affine = Linear(emb_channels, out_channels)
        # Zero: a student that starts from its teacher's weights starts as its teacher, at any s.
        self.affine_s = Linear(emb_channels, out_channels, scale=0.0) if s_branch else None
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, scale=1e-5)
        resized = in_channels != out_channels or resample is not None
        self.skip = Conv2d(in_channels, out_channels, 1, resample=resample) if resized else None
        self.attention = SelfAttention(out_channels, heads=heads) if attention else None

    def first(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input of the second convolution, and the skip path; both [B, out_channels, H', W']."""
        h = self.conv0(self.norm0(x, silu=True))
        shift = self.affine(emb)
        if self.affine_s is not None:
            shift = shift + self.affine_s(emb_s)
        h = self.norm1(h, x_shift=shift, silu=True)
        h = functional.dropout(h, self.dropout, self.training)
        return h, x if self.skip is None else self.skip(x)

    def second(self, h: Tensor, skip: Tensor) -> Tensor:
        """The block's output from what :meth:`first` returned."""
        # In place: the second pass over the image finds it in the cache, and needs no memory of its own.
        y = (skip + self.conv1(h)).mul_(SKIP_SCALE)
        if self.attention is not None:
            y = (self.attention(y) + y).mul_(SKIP_SCALE)
        return y

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None = None) -> Tensor:
        return self.second(*self.first(x, emb, emb_s))
