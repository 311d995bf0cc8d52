"""Requests of many threads, answered in common batches by one thread that has the model to itself."""

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from PIL import Image
from torch import Tensor

from ctm_fast.errors import ConfigError
from ctm_fast.serving.engine import Engine
from ctm_fast.serving.pixels import to_pictures
from ctm_fast.serving.request import (
    Integers,
    Output,
    Plan,
    Request,
    check_integers,
    check_number,
    check_plan,
    check_request,
)

Images = Tensor | list[Image.Image]
Kind = tuple[Plan, bool]
"""What requests of one batch have in common: the plan, and whether pixels are uint8."""

MAX_QUEUE = 2**31 - 1
MAX_WAIT_MS = 60_000.0


class QueueFullError(RuntimeError):
    """The server has as many images waiting as it may: try again later, or elsewhere."""


class ServerClosedError(RuntimeError):
    """The server takes no more requests: it was closed, or its thread ended on an error (``__cause__``)."""


@dataclass(eq=False)
class _Waiting:
    request: Request
    future: "Future[Images]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> Kind:
        return self.request.plan, self.request.output != "float"

    @property
    def images(self) -> int:
        return len(self.request.seeds)


class _Line:
    """Requests of one kind, in the order in which they came."""

    def __init__(self) -> None:
        self.requests: deque[_Waiting] = deque()
        self.images = 0

    def append(self, waiting: _Waiting) -> None:
        self.requests.append(waiting)
        self.images += waiting.images

    def pop(self) -> _Waiting:
        waiting = self.requests.popleft()
        self.images -= waiting.images
        return waiting

    def sweep(self) -> None:
        """Drop what was cancelled."""
        self.requests = deque(waiting for waiting in self.requests if not waiting.future.cancelled())
        self.images = sum(waiting.images for waiting in self.requests)

    @property
    def since(self) -> float:
        return self.requests[0].since


class Server:
    """A bounded queue before an engine; see :meth:`ctm_fast.serving.Sampler.serve` for the arguments.

    Requests with the same steps, gamma, sigmas and guidance share batches; the oldest goes first. Leaving a ``with``
    block drains the queue: each request that was accepted is answered. For SIGTERM, let the handler do no more than
    wake the thread that is in the block::

        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        with sampler.serve() as server:
            ...  # threads that submit, and expect ServerClosedError
            stop.wait()

    A program that ends without closing drops what waits: the server's thread is a daemon.
    """

    def __init__(self, engine: Engine, *, max_batch: int, max_wait_ms: float, max_queue: int) -> None:
        self._max_batch = _positive("max_batch", max_batch)
        self._max_queue = _positive("max_queue", max_queue)
        self._max_wait = check_number("max_wait_ms", max_wait_ms, MAX_WAIT_MS) / 1000
        if max_queue < max_batch:
            raise ConfigError(f"max_queue: expected at least max_batch, {max_batch}, got {max_queue}")
        self._engine = engine
        self._changed = threading.Condition()
        self._lines: dict[Kind, _Line] = {}
        self._running: list[_Waiting] = []
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="ctm_fast-server", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait to be made; cancelled ones count until others need their room."""
        with self._changed:
            return self._images()

    def submit(
        self,
        seeds: Integers,
        steps: int | None = None,
        gamma: float = 0.0,
        labels: Integers | int | None = None,
        output: Output = "float",
        *,
        sigmas: Iterable[float] | None = None,
        guidance: float | None = None,
    ) -> "Future[Images]":
        """The future of what ``sampler(seeds, ...)`` returns, with the arguments of :meth:`Sampler.__call__`.

        ``future.cancel()`` takes a request back that still waits. Callbacks of futures run in the server's thread.

        Raises, at once: ConfigError or LevelError for bad arguments or not 1 to ``max_batch`` seeds, QueueFullError,
        ServerClosedError. What goes wrong later is the future's exception.
        """
        engine = self._engine
        plan = check_plan(engine.model, engine.levels, steps, gamma, sigmas, guidance)
        waiting = _Waiting(check_request(engine.model, seeds, plan, labels, output))
        if not 1 <= waiting.images <= self._max_batch:
            raise ConfigError(f"seeds: expected 1 to max_batch, {self._max_batch}, got {waiting.images}")
        with self._changed:
            if self._closed:
                raise ServerClosedError("the server is closed") from self._broken
            if self._images() + waiting.images > self._max_queue:
                self._sweep()
            if self._images() + waiting.images > self._max_queue:
                raise QueueFullError(
                    f"{self._images()} images wait, and {waiting.images} more are over max_queue, {self._max_queue}"
                )
            self._lines.setdefault(waiting.kind, _Line()).append(waiting)
            self._changed.notify()
        return waiting.future

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; return when all are answered, or those that wait cancelled if not ``drain``.

        A batch that is being made is always finished. May be called again, and from any thread but the server's own.
        Raises TimeoutError if that takes more than ``timeout`` seconds; it goes on all the same.
        """
        with self._changed:
            self._closed = True
            dropped = [] if drain else [waiting for line in self._lines.values() for waiting in line.requests]
            self._changed.notify()
        for waiting in dropped:
            waiting.future.cancel()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the server still works after {timeout} s")

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _images(self) -> int:
        return sum(line.images for line in self._lines.values())

    def _sweep(self) -> None:
        for line in self._lines.values():
            line.sweep()
        self._lines = {kind: line for kind, line in self._lines.items() if line.requests}

    def _serve(self) -> None:
        try:
            while self._next():
                self._answer(self._running)
                self._running = []  # their images are the callers' alone
        except BaseException as error:
            self._break(error)
            raise

    def _next(self) -> bool:
        """Wait for requests, and set those to answer now running; False when closed and none wait."""
        with self._changed:
            while not self._running:
                wait = self._wait()
                if wait is None and self._closed:
                    return False
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                else:
                    self._running = self._take()
            return True

    def _wait(self) -> float | None:
        """Seconds until there is a batch to make; None if nothing waits."""
        if not self._lines:
            return None
        if self._closed or any(line.images >= self._max_batch for line in self._lines.values()):
            return 0.0
        return min(line.since for line in self._lines.values()) + self._max_wait - time.monotonic()

    def _take(self) -> list[_Waiting]:
        """The next batch, without what was cancelled: off the line that is full or overdue and waits the longest."""
        overdue = time.monotonic() - self._max_wait
        lines = self._lines.items()
        ready = [(kind, line) for kind, line in lines if line.images >= self._max_batch or line.since <= overdue]
        kind, line = min(ready or lines, key=lambda item: item[1].since)
        batch: list[_Waiting] = []
        room = self._max_batch
        while line.requests and line.requests[0].images <= room:
            waiting = line.pop()
            if waiting.future.set_running_or_notify_cancel():
                batch.append(waiting)
                room -= waiting.images
        if not line.requests:
            del self._lines[kind]
        return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        """Each request gets its images or, where it fails alone as well, its error."""
        try:
            answers = self._make(batch)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    self._answer([waiting])
            else:
                batch[0].future.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)

    def _make(self, batch: list[_Waiting]) -> list[Images]:
        plan, uint8 = batch[0].kind
        seeds = [seed for waiting in batch for seed in waiting.request.seeds]
        labels: list[int] | None = None
        if batch[0].request.labels is not None:
            labels = [label for waiting in batch for label in waiting.request.labels or ()]
        images = self._engine.run(seeds, labels, plan, uint8=uint8)
        # Memory of its own: who keeps one answer keeps no other's.
        parts = [part.clone() for part in images.split([waiting.images for waiting in batch])]
        return [
            to_pictures(part) if waiting.request.output == "pil" else part
            for waiting, part in zip(batch, parts, strict=True)
        ]

    def _break(self, error: BaseException) -> None:
        """Nobody waits for a thread that is no more."""
        with self._changed:
            self._closed, self._broken = True, error
            left = [waiting for line in self._lines.values() for waiting in line.requests]
            self._lines = {}
        unanswered = [waiting for waiting in self._running if not waiting.future.done()]
        unanswered += [waiting for waiting in left if waiting.future.set_running_or_notify_cancel()]
        for waiting in unanswered:
            refused = ServerClosedError(f"the server's thread ended: {error!r}")
            refused.__cause__ = error
            waiting.future.set_exception(refused)


def _positive(name: str, value: Any) -> int:
    (number,) = check_integers(name, [value], MAX_QUEUE)
    if number == 0:
        raise ConfigError(f"{name}: expected an integer in 1..{MAX_QUEUE}, got 0")
    return number
