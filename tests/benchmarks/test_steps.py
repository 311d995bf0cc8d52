"""Steps that run once for the same sources: what is run again, what is left when time is up, what a kill leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import steps
from benchmarks.processes import ROOT
from benchmarks.steps import Progress, Step

FOREVER = float("inf")


def step(folder: Path, name: str, then: str = "") -> Step:
    """Notes in ``folder/name`` that it ran, once a line, then runs ``then``."""
    code = f"import os, signal, sys, time; open({str(folder / name)!r}, 'a').write('ran\\n'); {then}"
    return Step(name, [sys.executable, "-c", code])


def count(folder: Path, name: str) -> int:
    return len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0


def outcomes(progress: Progress) -> dict[str, str]:
    return {name: end["outcome"] for name, end in progress.steps.items()}


def test_what_passed_is_not_run_again_and_what_failed_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [
        step(tmp_path, "dies", "os.kill(os.getpid(), signal.SIGSEGV)"),
        step(tmp_path, "fails", "print('the reason'); sys.exit(1)"),
        step(tmp_path, "passes"),
    ]
    assert Progress(tmp_path / "work", "source").run(todo, FOREVER, 2) == []
    assert "the reason" in capsys.readouterr().out
    again = Progress(tmp_path / "work", "source")
    assert outcomes(again) == {"dies": "failed", "fails": "failed", "passes": "passed"}
    assert again.run(todo, FOREVER, 1) == []
    assert [count(tmp_path, one.name) for one in todo] == [2, 2, 1]


def test_other_sources_start_over(tmp_path: Path) -> None:
    todo = [step(tmp_path, "passes")]
    Progress(tmp_path / "work", "one").run(todo, FOREVER, 1)
    Progress(tmp_path / "work", "other").run(todo, FOREVER, 1)
    assert count(tmp_path, "passes") == 2


def test_time_up_leaves_what_did_not_run_and_it_comes_first(tmp_path: Path) -> None:
    """The step that the deadline interrupts is not blamed; nor are those behind it begun."""
    todo = [step(tmp_path, "fails", "sys.exit(1)"), step(tmp_path, "slow", "time.sleep(60)"), step(tmp_path, "last")]
    progress = Progress(tmp_path / "work", "source")
    assert progress.run(todo[:1], FOREVER, 1) == []
    begin = time.monotonic()
    assert progress.run(todo, begin + 3, 1) == ["slow", "last", "fails"]
    assert time.monotonic() - begin < 30
    assert (count(tmp_path, "slow"), count(tmp_path, "last")) == (1, 0)
    assert outcomes(progress) == {"fails": "failed"}


def test_a_step_longer_than_anyone_waits_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PATIENCE", 0.5)
    progress = Progress(tmp_path / "work", "source")
    assert progress.run([step(tmp_path, "slow", "time.sleep(60)")], time.monotonic() + 1, 1) == []
    assert progress.steps["slow"]["outcome"] == "failed"
    assert progress.steps["slow"]["note"].startswith("interrupted after")


def test_killed_it_goes_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from benchmarks.steps import Progress
from tests.benchmarks.test_steps import step
folder = Path({str(tmp_path)!r})
sleep = f"open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
Progress(folder / "work", "source").run([step(folder, "first"), step(folder, "second", sleep)], float("inf"), 1)
"""
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for_the_end_of(int((tmp_path / "pid").read_text()))
    progress = Progress(tmp_path / "work", "source")
    assert outcomes(progress) == {"first": "passed"}
    assert progress.run([step(tmp_path, "first"), step(tmp_path, "second")], FOREVER, 1) == []
    assert (count(tmp_path, "first"), count(tmp_path, "second")) == (1, 2)


def wait_for_the_end_of(process: int) -> None:
    for _ in range(200):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    pytest.fail(f"process {process} outlived the one that started it")
