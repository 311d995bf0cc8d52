"""The parts of a training step that ``torch.compile`` takes over, one by one, and the clock beside them.

A region is compiled where that pays within a run. On a CPU, compiling costs tens of seconds a region, which a pass
that a step makes once does not return within minutes of training: there, only the teacher is compiled, which a CTM step
calls 2k times and never differentiates.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Timer:
    """Wall-clock seconds spent in named parts. CUDA is not waited for: there, events are read when asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((part, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds per part since the last call. Waits for the device."""
        for part, start, end in self._events:
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


class Regions:
    """Compiles what it is given, where that pays, and can be switched off to compare.

    Args:
        compile: whether ``--compile`` was asked for.
        device: on "cpu" only regions that a step calls many times are compiled, elsewhere all.
    """

    def __init__(self, *, compile: bool, device: torch.device) -> None:
        self.enabled = compile
        self.device = device
        self.timer = Timer(device)
        self.compiled: list[str] = []

    def compile(self, name: str, function: Callable[P, R], *, repeated: bool = False) -> Callable[P, R]:
        """``function``, compiled at its first call while ``enabled``; ``repeated``: a step calls it many times."""
        if not self.enabled or (self.device.type == "cpu" and not repeated):
            return function
        self.compiled.append(name)
        compiled = torch.compile(function, dynamic=False, fullgraph=True)

        def region(*args: P.args, **kwargs: P.kwargs) -> R:
            return (compiled if self.enabled else function)(*args, **kwargs)

        return region

    def bucket(self, batch: int) -> int:
        """What the sizes of parts of a batch are to be multiples of: few sizes where kernels are made for each."""
        few = self.enabled or self.device.type == "cuda"
        return max(1, batch // 4) if few else 1
