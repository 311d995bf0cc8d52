"""Sampling as one CUDA graph: every step of every kernel is launched at once, into memory that stays where it is."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctm_fast.serving.pixels import to_pixels

_REHEARSALS = 3
"""Runs before the capture, as torch.cuda.graph asks for: they compile and tune kernels and fill caches."""


class CapturedSampler:
    """Up to ``batch`` images by one replay of a graph; a call may come from any thread.

    Rows that a call does not fill are computed and dropped: no image depends on another one's row. Each graph has
    memory, a stream and a lock of its own. The lock is held while work is enqueued, not while it is done: the stream
    keeps the order of the calls.

    Args:
        sample: sample(seeds, labels) -> [B, C, H, W] float32 in [-1, 1], never waiting for the device.
        batch: rows of the graph.
        conditional: whether there are labels.
        device: a CUDA device.

    Other threads must not use the device while it is made.
    """

    def __init__(
        self, sample: Callable[[Tensor, Tensor | None], Tensor], batch: int, *, conditional: bool, device: torch.device
    ) -> None:
        self.batch = batch
        self._device = device
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._labels = torch.zeros(batch, dtype=torch.int64, device=device) if conditional else None
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_REHEARSALS):
                to_pixels(sample(self._seeds, self._labels))
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._images = sample(self._seeds, self._labels)
            self._pixels = to_pixels(self._images)

    def __call__(self, seeds: Sequence[int], labels: Sequence[int] | None, *, uint8: bool) -> Tensor:
        """[n, C, H, W] float32 in [-1, 1] on the device, or [n, H, W, C] uint8 in pinned memory; n <= batch seeds."""
        made = self._pixels if uint8 else self._images
        shape = (len(seeds), *made.shape[1:])
        current = torch.cuda.current_stream(self._device)
        # Made on the caller's stream: the memory goes back to it, and no other stream may use it before.
        result = _pinned(shape, made.dtype) if uint8 else torch.empty(shape, dtype=made.dtype, device=self._device)
        done = torch.cuda.Event()
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_stream(current)
            self._fill(self._seeds, seeds)
            if self._labels is not None and labels is not None:
                self._fill(self._labels, labels)
            self._graph.replay()
            result.copy_(made[: len(seeds)], non_blocking=True)
            done.record(self._stream)
        if uint8:
            done.synchronize()
        else:
            current.wait_event(done)
        return result

    def _fill(self, static: Tensor, values: Sequence[int]) -> None:
        """The first rows are ``values``, the rest zeros."""
        padded = _pinned((self.batch,), torch.int64)
        padded.copy_(torch.tensor([*values, *[0] * (self.batch - len(values))]))
        static.copy_(padded, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """``x`` of a CUDA device in pinned memory; waits for the caller's stream alone."""
    host = _pinned(tuple(x.shape), x.dtype)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)
