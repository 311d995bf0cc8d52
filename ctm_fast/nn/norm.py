"""Group normalisation as the blocks use it: with the shifts by the noise level before and after, and SiLU behind."""

from torch import Tensor, nn

from ctm_fast.ops import group_norm_silu


class GroupNorm(nn.GroupNorm):
    """GroupNorm and what follows it in a block, in one op; statistics in float32.

    ``forward(x)``: x [B, C, H, W] in any float dtype, which is also that of the result; ``x_shift``, ``scale`` and
    ``shift`` [B, C] in any float dtype, as :func:`ctm_fast.ops.group_norm_silu` takes them; ``silu`` to activate.

    Args:
        channels: C.
        groups: a divisor of C; by default EDM's min(32, C / 4).
        eps: added to the variance.
    """

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-6) -> None:
        super().__init__(groups or max(1, min(32, channels // 4)), channels, eps=eps)

    def forward(
        self,
        x: Tensor,
        *,
        silu: bool = False,
        x_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        x_shift, scale, shift = (None if value is None else value.float() for value in (x_shift, scale, shift))
        return group_norm_silu(
            x,
            self.weight,
            self.bias,
            groups=self.num_groups,
            eps=self.eps,
            x_shift=x_shift,
            scale=scale,
            shift=shift,
            silu=silu,
        )
