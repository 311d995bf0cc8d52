"""``make gpu``, rehearsed on the CPU: its stages on one small file, a sanitizer that is a script, and how it ends."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.processes import ROOT
from benchmarks.steps import Progress
from tests.command_line import assert_refused, call

SMALLEST = "noise_embed"
SANITIZER = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {log}
while [ "$1" != "{python}" ]; do shift; done
exec "$@"
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def rehearsal(tmp_path: Path, deadline: float = float("inf")) -> gpu.Run:
    return gpu.Run("cpu", SMALLEST, deadline, Progress(tmp_path / "work", "source"), tmp_path / "results")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(call(gpu.main, [], monkeypatch, capsys), "there is no CUDA device", torch.__version__)


@pytest.mark.parametrize(
    ("words", "names", "part"),
    [
        ("--stage bnech", "--stage: ", "expected one of build, test, sanitize, bench, got 'bnech'"),
        ("--device tpu", "--device: ", "expected cuda or cpu, got 'tpu'"),
        ("--budget soon", "argument --budget: ", "soon"),
    ],
)
def test_bad_arguments(
    words: str, names: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(gpu.main, words.split(), monkeypatch, capsys), names, part)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("numpy", "no-such-package"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu.sys, "executable", "/nowhere/python")
    result = call(gpu.main, ["--device", "cpu"], monkeypatch, capsys)
    assert_refused(result, "missing here: no-such-package, cmake, ninja")


def test_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file of the suite passes, and is not run a second time."""
    assert gpu.test(rehearsal(tmp_path, time.monotonic() - 1)) == 0
    assert f"out of time; run the same command again for what is left: test tests/ops/test_{SMALLEST}.py" in (
        capsys.readouterr().out
    )
    assert gpu.test(rehearsal(tmp_path)) == 0
    assert "test: 1 of 1 passed, 0 failed" in capsys.readouterr().out
    again = rehearsal(tmp_path, time.monotonic() - 1)
    assert gpu.test(again) == 0
    assert "1 of 1 passed" in capsys.readouterr().out
    assert " passed" in again.progress.steps[f"test tests/ops/test_{SMALLEST}.py"]["note"]


def test_sanitize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both tools run the kernels' own tests; what they find fails the stage."""
    log = tmp_path / "log"
    tool = script(tmp_path / "bin" / "compute-sanitizer", SANITIZER.format(log=log, python=gpu.sys.executable))
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: str(tool))
    this = rehearsal(tmp_path)
    assert gpu.sanitize(this) == 0, capsys.readouterr().out
    assert "sanitize: 2 of 2 passed" in capsys.readouterr().out
    memcheck, racecheck = sorted(log.read_text().splitlines())
    assert memcheck.startswith("1 --tool memcheck --error-exitcode 77 ") and "--tool racecheck" in racecheck
    for end in this.progress.steps.values():
        assert int(end["note"].split(" passed")[0]) > 5 and "deselected" in end["note"]
    script(tool, "#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\nexit 77\n")
    other = this._replace(progress=Progress(tmp_path / "other", "source"))
    assert gpu.sanitize(other) == 1
    out = capsys.readouterr().out
    assert "0 of 2 passed, 2 failed" in out and "ERROR SUMMARY: 1 error" in out


def test_sanitize_without_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.sanitize(rehearsal(tmp_path)) == 0
    assert capsys.readouterr().out == "sanitize: left out, compute-sanitizer is not on the path nor in CUDA_HOME/bin\n"


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        ('[ "$#" = 6 ] && exit 77; exit 0', None),  # the planted fault is a sixth word
        ("exit 0", "ends with 0 where there is a planted fault"),
        ("exit 77", "ends with 77 where there is no fault"),
        ("exit 1", "ends with 1 where there is a planted fault"),
    ],
)
def test_a_sanitizer_must_find_what_is_planted_and_nothing_else(
    tool: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    script(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = gpu.blind(str(script(tmp_path / "bin" / "compute-sanitizer", f"#!/bin/sh\n{tool}\n")))
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="the sanitizers' probe is CUDA C++, and there is no nvcc")
def test_the_probe_compiles(tmp_path: Path) -> None:
    source = ROOT / "benchmarks" / "sanitizer_probe.cu"
    subprocess.run(["nvcc", "-arch=sm_90", "-o", str(tmp_path / "probe"), str(source)], check=True)


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.bench(rehearsal(tmp_path, time.monotonic() - 1)) == 0
    (path,) = (tmp_path / "results").iterdir()
    out = capsys.readouterr().out
    assert f"wrote {path}" in out and f"what is left: bench_{SMALLEST}.py" in out


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All in turn; a failure ends in exit code 1, but only that of the build keeps the next stage from running."""
    ran: list[str] = []

    def stage(name: str, code: int, *passes: str) -> None:
        def run(this: gpu.Run) -> int:
            ran.append(name)
            for step in passes:
                this.progress.end(step, "passed", 0.0, "")
            return code

        monkeypatch.setitem(gpu.STAGES, name, run)

    def main(*words: str) -> int:
        ran.clear()
        return call(gpu.main, ["--device", "cpu", "--work", str(tmp_path), *words], monkeypatch, capsys)[0]

    stage("build", 1)
    assert (main(), ran) == (1, ["build"])
    stage("build", 0, "compile", "load")
    stage("test", 1)
    stage("sanitize", 0)
    stage("bench", 0)
    assert (main(), ran) == (1, ["build", "test", "sanitize", "bench"])
    assert (main("--stage", "bench"), ran) == (0, ["build", "bench"])
    assert (main("--stage", "build"), ran) == (0, ["build"])
