"""The parts of a training step that ``torch.compile`` takes over, one by one, and the clock beside them.

A region is compiled where that pays within a run. On a CPU, compiling costs tens of seconds a region, which a pass
that a step makes once does not return within minutes of training: there, only the teacher is compiled, which a CTM step
calls 2k times and never differentiates.
"""

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from ctm_fast.training.captured import CapturedHeun, LabelledDenoise

_GRAPHS = 64
"""Of one function, more than a stage can ask for: regions times sizes of a batch's parts, with and without gradients.

At PyTorch's own limit of 8 a region ends the run.
"""

P = ParamSpec("P")
R = TypeVar("R")


class Timer:
    """Wall-clock seconds spent in named parts. CUDA is not waited for: there, events are read when they are over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((part, start, end))
            # On ranks that write nothing nobody takes: there they would pile up.
            while self._events and self._events[0][2].query():
                self._add(*self._events.popleft())
        else:
            begin = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds per part since the last call. Waits for the device."""
        while self._events:
            self._events[0][2].synchronize()
            self._add(*self._events.popleft())
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _add(self, part: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._seconds[part] += start.elapsed_time(end) / 1000


class Regions:
    """Compiles what it is given, where that pays, and can be switched off to compare.

    Args:
        compile: whether ``--compile`` was asked for.
        device: on "cpu" only regions that a step calls many times are compiled, elsewhere all.
        capture: whether the teacher's Heun step is a CUDA graph.
    """

    def __init__(self, *, compile: bool, device: torch.device, capture: bool = False) -> None:
        self.capture = capture
        self.enabled = compile
        if compile:  # Dynamo counts by code, and methods of student and target, of several sizes each, share one
            torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
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

    def captured(self, denoise: LabelledDenoise) -> CapturedHeun | None:
        """The teacher's solver as a CUDA graph, another while ``enabled`` than while not; None without ``capture``."""
        return CapturedHeun(denoise, lambda: self.enabled) if self.capture else None

    def bucket(self, batch: int) -> int:
        """What the sizes of parts of a batch are to be multiples of: few sizes where kernels are made for each."""
        few = self.enabled or self.device.type == "cuda"
        return max(1, batch // 4) if few else 1
