"""The residual block of the U-Nets."""

from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.nn.attention import SelfAttention
from ctm_fast.nn.conv import Conv2d, Linear, Resample, Resampler, initialise
from ctm_fast.nn.style import BlockStyle


class UNetBlock(nn.Module):
    """Two 3x3 convolutions around the injection of the noise levels, optionally followed by attention.

        e = affine(emb) + affine_s(emb_s)
        h = conv0(silu(norm0(x)))                          resampled before the convolution if asked for
        h = silu(norm1(h + e))                             DDPM++ and NCSN++
        h = silu(norm1(h) (1 + scale) + shift)             ADM, (scale, shift) = e
        y = (skip(x) + conv1(dropout(h))) r                r: style.residual_scale
        y = (attention(y) + y) r                           if attention

    ``forward`` is ``second(*first(...))``: training cuts the last block of a network between the two.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        style: BlockStyle,
        s_branch: bool = False,
        resample: Resample | None = None,
        attention: bool = False,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.style = style
        self.resample = resample
        self.dropout = dropout
        init, e_channels = style.init, out_channels * (2 if style.modulate else 1)
        self.norm0 = style.norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample=resample, taps=style.taps, init=init)
        self.affine = Linear(emb_channels, e_channels, init=init)
        # Zero: a student that starts from its teacher's weights starts as its teacher, at any s.
        self.affine_s = Linear(emb_channels, e_channels, init=init, scale=0.0) if s_branch else None
        self.norm1 = style.norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=init, scale=style.end_scale)
        self.skip: Conv2d | Resampler | None = None
        if in_channels != out_channels or (resample is not None and style.project_resampled):
            self.skip = Conv2d(in_channels, out_channels, 1, resample=resample, taps=style.taps, init=init)
        elif resample is not None:
            self.skip = Resampler(resample, style.taps)
        self.attention = SelfAttention(out_channels, style=style, heads=heads) if attention else None

    def draw_s_branch(self) -> None:
        """Give ``affine_s`` random weights, as the published code starts it, in place of zeros."""
        if self.affine_s is not None:
            initialise(self.affine_s, self.style.init)

    def first(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input of the second convolution, and the skip path; both [B, out_channels, H', W']."""
        h = self.conv0(self.norm0(x, silu=True))
        e = self.affine(emb)
        if self.affine_s is not None:
            e = e + self.affine_s(emb_s)
        if self.style.modulate:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift, silu=True)
        else:
            h = self.norm1(h, x_shift=e, silu=True)
        h = functional.dropout(h, self.dropout, self.training)
        return h, x if self.skip is None else self.skip(x)

    def second(self, h: Tensor, skip: Tensor) -> Tensor:
        """The block's output from what :meth:`first` returned."""
        y = self._residual(skip, self.conv1(h))
        return y if self.attention is None else self._residual(self.attention(y), y)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None = None) -> Tensor:
        return self.second(*self.first(x, emb, emb_s))

    def _residual(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        # In place: the second pass over the image finds it in the cache, and needs no memory of its own.
        return total if self.style.residual_scale == 1 else total.mul_(self.style.residual_scale)
