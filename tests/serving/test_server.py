"""The server: every accepted request is answered once, with what the sampler alone would have given."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ctm_fast.errors import ConfigError, LevelError
from ctm_fast.models import CTM
from ctm_fast.serving import QueueFullError, Sampler, Server, ServerClosedError, load
from tests.serving.storm import storm, truth
from tests.snapshots import save_snapshot

ROOT = Path(__file__).parent.parent.parent
FOREVER = 60_000.0
SOON = 30.0
"""Seconds within which a small model answers on a busy machine, and far below FOREVER."""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_snapshot(tmp_path_factory.mktemp("server") / "ctm.safetensors", CTM)


@pytest.fixture
def sampler(snapshot: Path) -> Sampler:
    return load(snapshot, device="cpu")


class Gate:
    """An engine's ``run`` that waits to be let through, and notes what it was asked for."""

    def __init__(self, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self._run = sampler._engine.run
        monkeypatch.setattr(sampler._engine, "run", self.run)

    def run(self, seeds: list[int], *arguments: Any, **options: Any) -> Tensor:
        self.batches.append(list(seeds))
        self.entered.set()
        assert self.open.wait(SOON)
        return self._run(seeds, *arguments, **options)


@pytest.fixture
def gate(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(sampler, monkeypatch)
    yield gate
    gate.open.set()


def busy(server: Server, gate: Gate) -> "Future[Any]":
    """A request that the server is at, for as long as the gate is closed."""
    future = server.submit([999])
    assert gate.entered.wait(SOON)
    return future


def tensor(future: "Future[Any]") -> Tensor:
    result = future.result(SOON)
    assert isinstance(result, Tensor)
    return result


def test_answers_are_the_samplers(sampler: Sampler) -> None:
    options: list[dict[str, Any]] = [
        {"seeds": [3]},
        {"seeds": range(5), "steps": 2, "gamma": 0.5},
        {"seeds": range(7), "labels": 4},
        {"seeds": [8, 9], "sigmas": [80.0, 0.5, 0.002], "gamma": 1.0},
        {"seeds": range(3), "output": "uint8"},
    ]
    expected = [sampler(**given) for given in options]
    with sampler.serve(max_wait_ms=20) as server:
        futures = [server.submit(**given) for given in options]
        pictures = server.submit([1, 2], output="pil")
    for future, wanted in zip(futures, expected, strict=True):
        got = tensor(future)
        assert isinstance(wanted, Tensor)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert (got.double() - wanted.double()).abs().max() <= (1 if got.dtype == torch.uint8 else 1e-4)
    assert all(isinstance(picture, Image.Image) for picture in pictures.result())


def test_requests_share_batches(sampler: Sampler, gate: Gate) -> None:
    """Those of one plan, in their order, no more than fit; the plan whose request is the oldest goes first."""
    with sampler.serve(max_batch=8, max_wait_ms=0) as server:
        busy(server, gate)
        futures = [server.submit([i], steps=2) for i in range(3)]
        futures += [server.submit([10 * i, 10 * i + 1, 10 * i + 2]) for i in range(1, 5)]
        futures += [server.submit([3], steps=2)]
        assert server.waiting == 16
        gate.open.set()
    assert gate.batches[0] == [999]
    # Both lines are overdue: the oldest request decides.
    assert gate.batches[1:] == [[0, 1, 2, 3], [10, 11, 12, 20, 21, 22], [30, 31, 32, 40, 41, 42]]
    assert all(future.done() for future in futures)


def test_a_full_batch_does_not_wait(sampler: Sampler) -> None:
    with sampler.serve(max_batch=4, max_wait_ms=FOREVER) as server:
        futures = [server.submit([i, i + 1]) for i in range(2)]
        assert wait(futures, timeout=SOON).not_done == set()


def test_a_lone_request_waits_as_long_as_it_may(sampler: Sampler) -> None:
    with sampler.serve(max_wait_ms=200) as server:
        begin = time.monotonic()
        server.submit([1]).result(SOON)
        assert time.monotonic() - begin >= 0.2


def test_back_pressure(sampler: Sampler, gate: Gate) -> None:
    with sampler.serve(max_batch=4, max_wait_ms=0, max_queue=6) as server:
        busy(server, gate)
        first, second = server.submit(range(4)), server.submit([7, 8])
        with pytest.raises(QueueFullError, match="6 images wait, and 1 more are over max_queue, 6"):
            server.submit([9])
        assert first.cancel()
        third = server.submit(range(20, 24))  # in the room of what was cancelled
        with pytest.raises(QueueFullError):
            server.submit([9])
        gate.open.set()
        assert (len(tensor(second)), len(tensor(third))) == (2, 4)
    assert first.cancelled()
    assert gate.batches == [[999], [7, 8], [20, 21, 22, 23]]


def test_what_is_cancelled_is_not_made(sampler: Sampler, gate: Gate) -> None:
    with sampler.serve(max_wait_ms=0) as server:
        running = busy(server, gate)
        waiting = [server.submit([i]) for i in range(4)]
        assert not running.cancel()
        assert waiting[1].cancel() and waiting[2].cancel()
        gate.open.set()
        assert len(tensor(running)) == 1
    assert gate.batches == [[999], [0, 3]]
    with pytest.raises(CancelledError):
        waiting[1].result()


def test_a_request_fails_alone(sampler: Sampler, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    through = gate.run

    def run(seeds: list[int], *arguments: Any, **options: Any) -> Tensor:
        if 13 in seeds:
            raise RuntimeError("no memory for 13")
        return through(seeds, *arguments, **options)

    monkeypatch.setattr(sampler._engine, "run", run)
    with sampler.serve(max_wait_ms=0) as server:
        busy(server, gate)
        futures = {seed: server.submit([seed]) for seed in (11, 12, 13, 14)}
        gate.open.set()
        with pytest.raises(RuntimeError, match="no memory for 13"):
            futures[13].result(SOON)
        for seed in (11, 12, 14):
            assert len(tensor(futures[seed])) == 1
        assert len(tensor(server.submit([15]))) == 1  # and it goes on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_does_not_die_in_silence(sampler: Sampler, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fatal(BaseException):
        pass

    through = gate.run

    def run(*arguments: Any, **options: Any) -> Tensor:
        through(*arguments, **options)
        raise Fatal("the device is gone")

    monkeypatch.setattr(sampler._engine, "run", run)
    server = sampler.serve(max_wait_ms=0)
    running = busy(server, gate)
    waiting = server.submit([1], steps=2)
    gate.open.set()
    for future in (running, waiting):
        with pytest.raises(ServerClosedError, match="the server's thread ended: Fatal") as caught:
            future.result(SOON)
        assert isinstance(caught.value.__cause__, Fatal)
    with pytest.raises(ServerClosedError) as refused:
        server.submit([2])
    assert isinstance(refused.value.__cause__, Fatal)
    server.close(timeout=SOON)


@pytest.mark.parametrize("drain", [True, False])
def test_close(sampler: Sampler, gate: Gate, drain: bool) -> None:
    server = sampler.serve(max_batch=2, max_wait_ms=FOREVER)
    server.submit([998])
    running = busy(server, gate)  # the second fills the batch
    waiting = [server.submit([i]) for i in range(5)]
    closing = threading.Thread(target=server.close, kwargs={"drain": drain})
    closing.start()
    while not server._closed:
        time.sleep(0.001)
    with pytest.raises(ServerClosedError, match="the server is closed"):
        server.submit([6])
    with pytest.raises(TimeoutError):
        server.close(timeout=0.01)
    gate.open.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert len(tensor(running)) == 1
    assert [future.cancelled() for future in waiting] == [not drain] * 5
    assert all(future.done() for future in waiting)
    server.close()


def test_an_error_in_the_block_cancels(sampler: Sampler) -> None:
    def program(futures: "list[Future[Any]]") -> None:
        with sampler.serve(max_wait_ms=FOREVER) as server:
            futures.append(server.submit([1]))
            raise ZeroDivisionError

    futures: list[Future[Any]] = []
    with pytest.raises(ZeroDivisionError):
        program(futures)
    assert futures[0].cancelled()


def test_an_answer_keeps_no_other_alive(sampler: Sampler) -> None:
    with sampler.serve(max_batch=9, max_wait_ms=FOREVER) as server:
        futures = [server.submit([1]), server.submit(range(8))]
        first, second = map(tensor, futures)
    assert first.untyped_storage().nbytes() == first.nbytes
    assert second.untyped_storage().nbytes() == second.nbytes


def test_the_server_computes_with_the_callers_threads(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = sampler._engine.run

    def noting(*arguments: Any, **options: Any) -> Tensor:
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return run(*arguments, **options)

    monkeypatch.setattr(sampler._engine, "run", noting)
    with sampler.serve(max_wait_ms=0) as server:
        server.submit([1]).result(SOON)
        server.submit([2]).result(SOON)
    assert seen == [(1, True)] * 2  # conftest's one; and a call left no grad mode behind
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [-1]}, "seeds: .* got -1"),
        ({"seeds": range(65)}, "seeds: expected 1 to max_batch, 64, got 65"),
        ({"seeds": []}, "seeds: expected 1 to max_batch, 64, got 0"),
        ({"seeds": [0], "gamma": 1.5}, r"gamma: .* got 1\.5"),
        ({"seeds": [0], "labels": 10}, "labels: .* got 10"),
        ({"seeds": [0], "sigmas": [1.0, float("nan")]}, "sigmas: .* got nan"),
    ],
)
def test_bad_requests_are_refused_at_once(sampler: Sampler, arguments: dict[str, Any], message: str) -> None:
    with sampler.serve() as server, pytest.raises((ConfigError, LevelError), match=message):
        server.submit(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, r"max_batch: expected an integer in 1\.\."),
        ({"max_batch": 2.5}, r"max_batch: .* got 2\.5"),
        ({"max_queue": -1}, "max_queue: .* got -1"),
        ({"max_queue": 8}, "max_queue: expected at least max_batch, 64, got 8"),
        ({"max_wait_ms": -1}, r"max_wait_ms: expected a number in 0\.\.60000, got -1"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms: .* got nan"),
        ({"max_wait_ms": "5"}, "max_wait_ms: expected a number, got '5'"),
    ],
)
def test_bad_servers(sampler: Sampler, arguments: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        sampler.serve(**arguments)
    assert threading.active_count() == before


def resident() -> int:
    """KiB that the process has in memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc/self/status")
@pytest.mark.parametrize("requests", [600, pytest.param(10_000, marks=pytest.mark.long)])
def test_load(sampler: Sampler, requests: int) -> None:
    """Mixed sizes and plans from 64 threads, cancellations and 1 % bad requests, a queue that fills up."""
    sampler.warmup(range(1, 17))  # oneDNN keeps a kernel for each size that a batch may have
    expected = truth(sampler)
    with sampler.serve(max_batch=16, max_wait_ms=2, max_queue=128) as server:
        storm(server, expected, 600, 64, seed=0)  # what memory the threads take, they have
        gc.collect()
        before, objects = resident(), len(gc.get_objects())
        begin = time.monotonic()
        outcome = storm(server, expected, requests, 64, seed=1)
        seconds = time.monotonic() - begin
        p50, p99, callbacks = outcome.percentile(0.5), outcome.percentile(0.99), outcome.callbacks
        outcome.seconds, outcome.callbacks = [], []
        gc.collect()
        after, more = resident(), len(gc.get_objects()) - objects
        assert server.waiting == 0
    counts = outcome.counts
    print(
        f"{requests} requests in {seconds:.1f} s: {dict(counts)}, p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms, "
        f"RSS {before / 1024:.1f} MiB before, {after / 1024:.1f} after, {more} more objects"
    )
    assert counts["failed"] == 0
    assert counts["answered"] + counts["cancelled"] + counts["refused"] == requests
    assert counts["refused"] > 0 and counts["cancelled"] > 0 and counts["answered"] > requests / 2
    assert callbacks == [1] * (requests - counts["refused"])
    assert after - before < 24 * 1024
    assert more < requests / 2  # a future that is kept has several


_PROGRAM = """
import json, signal, sys, threading
from concurrent.futures import CancelledError
import torch
from ctm_fast.serving import QueueFullError, ServerClosedError, load

torch.set_num_threads(1)
sampler = load(sys.argv[1], device="cpu")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
accepted, refused, lock = [], [], threading.Lock()

def client(index):
    for i in range(10**9):
        try:
            future = server.submit(range(index, index + 1 + i % 5), steps=1 + i % 2, output="uint8")
        except QueueFullError:
            stop.wait(0.001)
            continue
        except ServerClosedError:
            refused.append(index)
            return
        with lock:
            accepted.append((1 + i % 5, future))
            if len(accepted) == 200:
                print("busy", flush=True)

with sampler.serve(max_batch=16, max_wait_ms=2, max_queue=256) as server:
    clients = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    for thread in clients:
        thread.start()
    stop.wait()
    waiting = server.waiting
for thread in clients:
    thread.join()
answered = sum(future.done() and len(future.result(0)) == images for images, future in accepted)
print(json.dumps({
    "accepted": len(accepted), "answered": answered, "waiting": waiting, "refused": len(refused)
}))
"""


def test_sigterm_drains(snapshot: Path) -> None:
    """A program under load, as the server's docstring has it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(snapshot)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    counted = json.loads(out)
    assert counted["accepted"] >= 200
    assert counted["answered"] == counted["accepted"]
    assert counted["waiting"] > 0, "it was not under load"
    assert counted["refused"] == 8
