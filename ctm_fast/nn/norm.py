"""Group normalisation with the group count that the published networks use."""

from torch import Tensor, nn
from torch.nn import functional


class GroupNorm(nn.GroupNorm):
    """GroupNorm of min(32, C / 4) groups; statistics in float32, output in the dtype of ``x`` [B, C, H, W]."""

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__(max(1, min(32, channels // 4)), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
