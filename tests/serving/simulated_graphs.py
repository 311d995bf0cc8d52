"""CUDA graphs without CUDA: what is captured is noted op by op, and a replay runs it again in the same memory.

So it has what matters about a graph: it reads and writes the memory that it was captured with, whatever the arguments
of a later call are, and values that Python knew while it was captured stay as they were.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.serving import cuda_graphs


class Graph(TorchDispatchMode):
    """Notes ops while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.ops:
            new = func(*args, **kwargs)
            for static, fresh in zip(_tensors(out), _tensors(new), strict=True):
                if static.data_ptr() != fresh.data_ptr():  # neither a view nor written in place
                    static.copy_(fresh)


class Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        assert event.recorded

    def synchronize(self) -> None:
        pass


class Event:
    recorded = False

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@contextlib.contextmanager
def _capture(graph: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    with graph:
        yield


def simulate(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Have ``cuda_graphs`` capture on the CPU; the graphs as they are made."""
    made: list[Graph] = []

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(cuda_graphs, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    return made


def _tensors(out: Any) -> list[Tensor]:
    several = out if isinstance(out, tuple | list) else [out]
    return [tensor for tensor in several if isinstance(tensor, Tensor)]
