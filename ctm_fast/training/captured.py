"""The teacher's Heun step as one CUDA graph, replayed k times: thousands of launches become one."""

import itertools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ctm_fast.diffusion.ode import heun_step

LabelledDenoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_REHEARSALS = 3
"""Steps before the capture, as torch.cuda.graph asks for: they compile and tune kernels and fill caches."""


class CapturedHeun:
    """:func:`ctm_fast.diffusion.ode.solve_heun` for a ``denoise`` on a CUDA device, by a graph for each size of batch.

    A graph reads and writes memory of its own: images, two levels and labels are copied in, and the image that a step
    leaves is where the next one starts. Weights are read where they lie, so they must stay there. Call it under
    ``torch.no_grad()``.

    Args:
        denoise: denoise(x, sigma, labels), which never waits for the device.
        mode: what decides, beside sizes, which kernels ``denoise`` calls.
    """

    def __init__(self, denoise: LabelledDenoise, mode: Callable[[], Hashable] = lambda: None) -> None:
        self._denoise = denoise
        self._mode = mode
        self._steps: dict[Hashable, _Step] = {}

    def __call__(self, x: Tensor, levels: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """x [B, C, H, W] after Heun steps through ``levels``, each [B], largest first."""
        key = (x.shape, labels is None, self._mode())
        if key not in self._steps:
            self._steps[key] = _Step(self._denoise, x, levels[0], labels)
        return self._steps[key].through(x, levels, labels)


class _Step:
    """One step of one size."""

    def __init__(self, denoise: LabelledDenoise, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        self._x, self._t, self._next = x.clone(), t.clone(), t.clone()
        self._labels = None if labels is None else labels.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_REHEARSALS):
                self._make(denoise)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._x.copy_(self._make(denoise))

    def _make(self, denoise: LabelledDenoise) -> Tensor:
        return heun_step(lambda x, sigma: denoise(x, sigma, self._labels), self._x, self._t, self._next)

    def through(self, x: Tensor, levels: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        self._x.copy_(x)
        if self._labels is not None and labels is not None:
            self._labels.copy_(labels)
        for t, t_next in itertools.pairwise(levels):
            self._t.copy_(t)
            self._next.copy_(t_next)
            self._graph.replay()
        return self._x.clone()
