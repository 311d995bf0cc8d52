"""Batch normalisation whose statistics may be those of all ranks' batches together, on any backend."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks; each rank's loss depends on it, so its gradient is a sum over ranks, too.

    Differentiable twice, as R1 asks.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return _SumOverRanks.apply(grads[0].contiguous())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks of the default process group, where there are several.

    PyTorch's SyncBatchNorm refuses CPU tensors; this one reduces once, with any backend. On one rank it is BatchNorm2d.
    Ranks may have batches of different sizes. Losses that are means over a rank's batch, averaged over ranks, then have
    the gradients of one rank with the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        channels = x.shape[1]
        # Sums about the running mean, the same on every rank: without it the variance would be a small difference of
        # large numbers.
        centre = self.running_mean.clone().view(1, -1, 1, 1)
        moved = x - centre  # at least float32, as the buffers are
        count = moved.new_full((1,), x.numel() // channels)
        sums = _SumOverRanks.apply(torch.cat([moved.sum((0, 2, 3)), moved.square().sum((0, 2, 3)), count]))
        total = sums[-1]
        mean, square = sums[:channels] / total, sums[channels:-1] / total
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            finite = sums.isfinite().all()  # else the step will be void, and the next ones need a centre
            for running, now in (
                (self.running_mean, mean + self.running_mean),
                (self.running_var, variance * (total / (total - 1))),
            ):
                running.copy_(torch.where(finite, running.lerp(now, self.momentum), running))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shape = (1, -1, 1, 1)
        y = (moved - mean.view(shape)) * scale.view(shape)
        return (y if self.bias is None else y + self.bias.view(shape)).to(x.dtype)
