"""What the blocks of one family of U-Nets have in common, and those of another have otherwise."""

from dataclasses import dataclass

from ctm_fast.nn.conv import BOX, Init
from ctm_fast.nn.norm import GroupNorm


@dataclass(frozen=True)
class BlockStyle:
    """The blocks of DDPM++ by default."""

    modulate: bool = False
    """Whether the noise level scales and shifts the normalised image (ADM), or shifts it before the norm."""
    residual_scale: float = 0.5**0.5
    """Factor on each sum of a branch and its skip path."""
    project_resampled: bool = True
    """Whether the skip path of a resampling block has a 1x1 convolution where the channels stay the same."""
    groups: int | None = None
    """Of each norm; None for min(32, C / 4)."""
    eps: float = 1e-6
    taps: tuple[int, ...] = BOX
    """The resampling filter."""
    init: Init = "xavier"
    qkv_scale: float = 0.2**0.5
    """Factor on the initial weights of qkv, and next of the layers that end a branch."""
    end_scale: float = 1e-5

    def norm(self, channels: int) -> GroupNorm:
        """The norm of ``channels`` in this style."""
        return GroupNorm(channels, groups=self.groups, eps=self.eps)
