"""Recording: the figures of each benchmark on disk as it ends, and what crashes, kills and deadlines leave of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as record_module
from benchmarks import recording as recording_module
from benchmarks.figures import table
from benchmarks.processes import ROOT
from benchmarks.record import FIRST, LAST, benchmark_files, conclude, record
from benchmarks.recording import Recording, file_name, fingerprint
from tests.benchmarks.test_steps import count, wait_for_the_end_of

FOREVER = float("inf")
VALUES: dict[str, Any] = {
    "machine": {"CPU": "Some CPU", "cores": "2 usable of 2", "threads": "1", "GPU": "none"},
    "versions": {},
    "build": {},
    "libraries": {},
}
BENCHMARKS = """
import os, signal, time
from pathlib import Path

HERE = Path({folder!r})


def run(benchmark, name, rounds=3):
    with open(HERE / name, "a") as file:
        file.write("ran\\n")
    benchmark.extra_info.update({{"way": "cpp", "share": 0.5, "GB/s": 1.0}})
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=rounds)


def test_first(benchmark):
    run(benchmark, "first")


def test_second(benchmark):
    run(benchmark, "second")
    {second}


def test_third(benchmark):
    run(benchmark, "third")
"""


def benchmarks(folder: Path, second: str = "pass") -> Path:
    """A file of three benchmarks; ``second`` is what the second one does after it was timed."""
    (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
    path = folder / "bench_three.py"
    path.write_text(BENCHMARKS.format(folder=str(folder), second=second))
    return path


def new(folder: Path) -> Recording:
    return Recording.open(folder / "results" / "machine.json", VALUES)


def counts(folder: Path) -> list[int]:
    return [count(folder, name) for name in ("first", "second", "third")]


def test_a_crash_takes_one_benchmark_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = new(tmp_path)
    file = benchmarks(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert record([file], recording, FOREVER) == []
    content = json.loads(recording.path.read_text())
    assert content == recording.content
    assert list(content["results"]) == ["test_first", "test_third"]
    assert content["failures"] == {"test_second": "the process ended with signal 11"}
    assert "running" not in content and "bench_three.py" in content["files"]
    assert counts(tmp_path) == [1, 1, 1]
    figures = content["results"]["test_first"]
    assert figures["median seconds"] >= 0.001 and figures["rounds"] == 3 and figures["GB/s"] == 1.0
    assert conclude(recording, []) == 1
    assert "failed: test_second" in capsys.readouterr().out
    assert record([file], recording, FOREVER) == []
    assert counts(tmp_path) == [1, 1, 1], "what is recorded is not run again"


def test_a_gate_that_fails_keeps_its_figures(tmp_path: Path) -> None:
    recording = new(tmp_path)
    assert record([benchmarks(tmp_path, "assert False, 'too slow'")], recording, FOREVER) == []
    assert list(recording.results) == ["test_first", "test_second", "test_third"]
    assert list(recording.failures) == ["test_second"] and "too slow" in recording.failures["test_second"]


def test_time_up_stops_between_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record_module, "GRACE", 120)  # pytest starts slowly on a busy machine
    recording = new(tmp_path)
    file = benchmarks(tmp_path)
    assert record([file], recording, time.monotonic() - 1) == ["bench_three.py"]
    left = record([file], recording, time.monotonic() + 0.5)  # over before pytest has started
    assert left == ["bench_three.py"] and counts(tmp_path) == [0, 0, 0] and not recording.failures
    assert conclude(recording, left) == 0
    assert "out of time; run the same command again for what is left: bench_three.py" in capsys.readouterr().out
    assert record([file], recording, FOREVER) == []
    assert counts(tmp_path) == [1, 1, 1]


def test_a_benchmark_that_outlasts_two_runs_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its file are run."""

    def interrupted(command: Any, log: Path, deadline: float) -> int | None:
        other = Recording(tmp_path / "results" / "machine.json")
        for name in ("test_long", "test_next"):
            if not other.has(name):
                other.begin(name)
                if name == "test_long":
                    return None
                other.end(name, {"median seconds": 1.0}, None)
        return 0

    monkeypatch.setattr(record_module, "run", interrupted)
    monkeypatch.setattr(record_module, "_summary", lambda log: "")
    recording, file = new(tmp_path), Path("bench_long.py")
    assert record([file], recording, FOREVER) == ["bench_long.py"] and not recording.count
    monkeypatch.setattr(record_module, "PATIENCE", -1.0)
    assert record([file], recording, FOREVER) == ["bench_long.py"] and not recording.count
    assert record([file], recording, FOREVER) == ["bench_long.py"] and list(recording.failures) == ["test_long"]
    assert recording.failures["test_long"].startswith("interrupted twice")
    assert record([file], recording, FOREVER) == [] and list(recording.results) == ["test_next"]


def test_killed_it_goes_on_with_the_benchmark_that_ran(tmp_path: Path) -> None:
    file = benchmarks(tmp_path, "(HERE / 'go').exists() or (time.sleep(60))")
    recording = new(tmp_path)
    program = f"""
from pathlib import Path
from benchmarks.record import record
from benchmarks.recording import Recording
record([Path({str(file)!r})], Recording(Path({str(recording.path)!r})), float("inf"))
"""
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while count(tmp_path, "second") == 0:
        assert killed.poll() is None
        time.sleep(0.05)
    (child,) = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for_the_end_of(int(child))
    recording.reload()
    assert list(recording.results) == ["test_first"] and recording.running == "test_second"
    (tmp_path / "go").touch()
    again = new(tmp_path)
    assert record([file], again, FOREVER) == []
    assert counts(tmp_path) == [1, 2, 1] and len(again.results) == 3 and not again.failures


def test_other_sources_or_another_machine_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new(tmp_path).end("test_one", {"median seconds": 1.0}, None)
    assert new(tmp_path).has("test_one")
    upgraded = VALUES | {"versions": {"torch": "3"}}
    path = tmp_path / "results" / "machine.json"
    assert not Recording.open(path, upgraded).has("test_one")
    new(tmp_path).end("test_one", {"median seconds": 1.0}, None)
    monkeypatch.setattr(recording_module, "fingerprint", lambda: "others")
    assert not new(tmp_path).has("test_one")


def test_fingerprint_follows_sources_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cu").write_text("one")
    first = fingerprint(("csrc",))
    (tmp_path / "csrc" / "results.json").write_text("{}")
    assert fingerprint(("csrc",)) == first
    (tmp_path / "csrc" / "op.cu").write_text("two")
    second = fingerprint(("csrc",))
    (tmp_path / "csrc" / "op.cu").rename(tmp_path / "csrc" / "other.cu")
    assert len({first, second, fingerprint(("csrc",))}) == 3


def test_ceilings_and_the_bet_come_first_and_networks_last() -> None:
    names = [path.name for path in benchmark_files()]
    last = set(LAST) & set(names)
    assert tuple(names[: len(FIRST)]) == FIRST and set(names[-len(last) :]) == last and len(last) >= 3
    assert benchmark_files("gamma_step")[0].name == "bench_gamma_step.py"


def test_file_name() -> None:
    assert file_name(VALUES["machine"]) == "some-cpu-2-cores.json"
    assert file_name(VALUES["machine"] | {"GPU 0": "NVIDIA H200, sm_90, 139 GiB"}) == "nvidia-h200.json"


def test_table() -> None:
    """Of each op the largest size, in channels_last, its ways side by side; then the ratios."""

    def figures(way: str, microseconds: float, share: float) -> dict[str, Any]:
        return {"way": way, "median seconds": microseconds * 1e-6, "share": share}

    results = {
        "test_copy": {"median seconds": 1.0, "GB/s": 3000.0},
        "test_matmul": {"median seconds": 1.0, "TFLOP/s": 790.0},
        "test_op[cpp-forward-channels_last-64x3x32x32]": figures("cpp", 11, 0.3),
        "test_op[cpp-forward-contiguous-512x3x64x64]": figures("cpp", 33, 0.8),
        "test_op[cpp-forward-channels_last-512x3x64x64]": figures("cpp", 22, 0.9),
        "test_op[eager-forward-channels_last-512x3x64x64]": figures("eager", 44, 0.4),
        "test_op[cpp-forward+backward-channels_last-512x3x64x64]": figures("cpp", 55, 0.7),
        "test_net[forward]": {"median seconds": 1.0, "ratios": {"compiled": 1.0, "compiled+cpp": 0.8}},
    }
    lines = table({"results": results, "machine": VALUES["machine"], "commit": "abc"}).splitlines()
    assert "ceiling, copy: 3000 GB/s" in lines and "ceiling, matmul: 790 TFLOP/s" in lines
    (forward,) = [line for line in lines if "22 (90%)" in line]
    assert "512x3x64x64 channels_last" in forward and "eager 44 (40%)" in forward
    assert any("cpp 55 (70%)" in line for line in lines)
    assert not any("11 (" in line or "33 (" in line for line in lines)
    assert any("net[forward]" in line and "compiled+cpp 0.80" in line for line in lines)
