"""What makes the images: the model as it is, or what :meth:`Engine.warmup` made of it for its device."""

import contextlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.models.prepacked import prepack, unsupported
from ctm_fast.samplers import generate
from ctm_fast.serving.cuda_graphs import CapturedSampler, to_host
from ctm_fast.serving.pixels import to_pixels
from ctm_fast.serving.request import Plan


class Engine:
    """Images of seeds and classes that were checked. ``run`` changes nothing and may be called from many threads.

    Args:
        model: in eval mode.
        levels: the range of noise levels it was trained on.
        batch: how many images the network makes at once, where no graph says so.
    """

    def __init__(self, model: CTM | EDMDenoiser, levels: Levels, batch: int) -> None:
        self.model = model
        self.levels = levels
        self.batch = batch
        self.device = model.net.out_conv.weight.device
        self._serving = model
        self._graphs: dict[Plan, dict[int, CapturedSampler]] = {}
        self._warming = threading.Lock()

    def warmup(self, batch_sizes: Sequence[int], plan: Plan) -> str:
        """See :meth:`ctm_fast.serving.Sampler.warmup`."""
        with self._warming, self._current():
            return self._capture(batch_sizes, plan) if self.device.type == "cuda" else self._prepack(batch_sizes, plan)

    def run(self, seeds: Sequence[int], labels: Sequence[int] | None, plan: Plan, *, uint8: bool) -> Tensor:
        """[B, C, H, W] float32 in [-1, 1] on the device, or [B, H, W, C] uint8 on the CPU."""
        with self._current():
            return self._run(seeds, labels, plan, uint8=uint8)

    def _current(self) -> AbstractContextManager[object]:
        """The device made current: each thread has its own, and a kernel of Triton is launched on the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _run(self, seeds: Sequence[int], labels: Sequence[int] | None, plan: Plan, *, uint8: bool) -> Tensor:
        graphs = self._graphs.get(plan, {})
        parts = []
        start = 0
        for rows, size in divide(len(seeds), tuple(graphs) or (self.batch,)):
            make = graphs.get(size) or partial(self._eager, plan)
            some = slice(start, start + rows)
            parts.append(make(seeds[some], None if labels is None else labels[some], uint8=uint8))
            start += rows
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else self._eager(plan, [], None if labels is None else [], uint8=uint8)

    def _eager(self, plan: Plan, seeds: Sequence[int], labels: Sequence[int] | None, *, uint8: bool) -> Tensor:
        rows = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        classes = None if labels is None else torch.tensor(labels, dtype=torch.int64, device=self.device)
        x = self._sample(plan, rows, classes)
        if not uint8:
            return x
        pixels = to_pixels(x)
        return to_host(pixels) if pixels.is_cuda else pixels

    def _sample(self, plan: Plan, seeds: Tensor, labels: Tensor | None) -> Tensor:
        """[B, C, H, W] float32 in [-1, 1]."""
        x = generate(
            self._serving,
            self.levels,
            seeds,
            labels,
            gamma=plan.gamma,
            sigmas=plan.sigmas,
            guidance=plan.guidance,
        )
        return x.clamp_(-1, 1)

    def _capture(self, batch_sizes: Sequence[int], plan: Plan) -> str:
        graphs = dict(self._graphs.get(plan, {}))
        for size in sorted(set(batch_sizes) - set(graphs), reverse=True):
            graphs[size] = CapturedSampler(
                partial(self._sample, plan), size, conditional=self.model.net.label_dim > 0, device=self.device
            )
        self._graphs = {**self._graphs, plan: graphs}
        return f"one CUDA graph for each batch of {', '.join(map(str, sorted(graphs)))}"

    def _prepack(self, batch_sizes: Sequence[int], plan: Plan) -> str:
        reason = unsupported(self.model.dtype)
        if reason is None and self._serving is self.model:
            net = prepack(self.model.net, self.model.dtype)
            self._serving = type(self.model)(net, self.model.sigma_data, dtype=self.model.dtype).eval()
        for size in batch_sizes:  # memory is fetched, and oneDNN makes its kernels for the size
            self.run([0] * size, [0] * size if self.model.net.label_dim else None, plan, uint8=True)
        return "convolutions with packed weights" if reason is None else f"weights as they are: {reason}"


def divide(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """``count`` rows in batches of ``sizes``, as (rows, size): the largest while it is full, then one for the rest.

    That is the smallest which holds it; its other rows are padding.
    """
    largest = max(sizes)
    full, rest = divmod(count, largest)
    parts = [(largest, largest)] * full
    return [*parts, (rest, min(size for size in sizes if size >= rest))] if rest else parts
