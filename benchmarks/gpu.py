"""``make gpu``: what a machine with a GPU and without a network can tell of these sources, nine minutes at a time.

    build      the libraries in place, against the torch that is there, for the GPU that is there
    test       the whole test suite, its kernels on the GPU as well, file by file
    sanitize   compute-sanitizer's memcheck and racecheck over the tests of the kernels, where it works
    bench      the benchmarks, ceilings and bet first; benchmarks/results/<gpu>.json is whole after each of them

Run the same command again, after it stopped for time or was killed, and it goes on with what is left; sources that
changed start over. ``build/gpu`` keeps what was run and the output of each step. ``--device cpu`` rehearses all of it
on a machine without a GPU.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.processes import ROOT, run
from benchmarks.record import benchmark_files, conclude, record
from benchmarks.recording import RESULTS, SOURCES, Recording, fingerprint
from benchmarks.steps import Progress, Step
from ctm_fast import _libraries
from ctm_fast.errors import ConfigError
from ctm_fast.runtime import Parser
from ctm_fast.runtime import run as run_program

WORK = ROOT / "build" / "gpu"
BUDGET = 510.0
"""Seconds; with what it takes to start and to stop, nine minutes."""
NEEDED = ("numpy", "pillow", "safetensors", "tqdm", "pytest", "pytest-benchmark", "setuptools", "pybind11")
"""What the stages cannot do without, besides torch, cmake, ninja and compilers."""
WANTED = ("triton", "hypothesis", "matplotlib", "scikit-learn", "scipy")
"""Without these, tests and kernels are left out, and say so."""
LOAD = "import sys, ctm_fast; from ctm_fast import _libraries; sys.exit(_libraries.missing(sys.argv[1]))"
SANITIZERS = ("memcheck", "racecheck")
FOUND = 77
"""The exit code by which compute-sanitizer tells that it found something."""
SMALL = "not compile and not opcheck and not Statistics and not graph and not threads and not kills"
"""Left out under the sanitizers: compilation, and what takes many samples."""


class Run(NamedTuple):
    """One run of this program."""

    device: str
    only: str
    deadline: float
    progress: Progress
    results: Path

    def names(self, folder: str) -> list[str]:
        """Files of tests below ``folder`` whose path contains ``only``, those of the kernels first."""
        files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).rglob("test_*.py"))]
        return sorted((name for name in files if self.only in name), key=lambda name: not name.startswith("tests/ops"))


def missing() -> list[str]:
    """The packages and tools that the stages need and that are not here."""
    absent = [name for name in NEEDED if not _installed(name)]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return absent + [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=beside) is None]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def build(this: Run) -> int:
    environment = {"CTM_FAST_BUILD": "required", "CTM_FAST_CUDA": "1" if this.device == "cuda" else "0"}
    compiling = Step("compile", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment)
    loading = Step("load", [sys.executable, "-c", LOAD, this.device])
    if not all((_libraries.DIRECTORY / _libraries.FILES[device]).exists() for device in {"cpu", this.device}):
        this.progress.steps.pop("compile", None)  # the files of an earlier build are gone
    left = this.progress.run([compiling], this.deadline, 1)
    if this.progress.passed("compile"):
        left += this.progress.run([loading], this.deadline, 1)
    return _told("build", this, [compiling, loading], left)


def test(this: Run) -> int:
    steps = [
        Step(f"test {name}", [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", name])
        for name in this.names("tests")
    ]
    return _told("test", this, steps, this.progress.run(steps, this.deadline, _jobs()))


def sanitize(this: Run) -> int:
    tool = find_sanitizer()
    if tool is None:
        print("sanitize: left out, compute-sanitizer is not on the path nor in CUDA_HOME/bin")
        return 0
    if this.device == "cuda" and (reason := blind(tool)):
        print(f"sanitize: left out, {reason}")
        return 0
    kernels = f"(cpp-{this.device} or triton-{this.device}) and {SMALL}"
    steps = [
        Step(
            f"{name} {file}",
            [
                *(tool, "--tool", name, "--error-exitcode", str(FOUND), "--report-api-errors", "no"),
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", kernels),
            ],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor its own allocation, whose ends memcheck knows
        )
        for name in SANITIZERS
        for file in this.names("tests/ops")
    ]
    return _told("sanitize", this, steps, this.progress.run(steps, this.deadline, _jobs()))


def bench(this: Run) -> int:
    recording = Recording.of_this_machine(this.results)
    left = record(benchmark_files(this.only), recording, this.deadline)
    return conclude(recording, left)


STAGES: dict[str, Callable[[Run], int]] = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def find_sanitizer() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), str(home)]))


def blind(tool: str) -> str | None:
    """Why ``tool`` is of no use on this machine: it must find the faults of sanitizer_probe.cu, and those alone."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), str(home)]))
    if nvcc is None:
        return "there is no nvcc to compile the probe of compute-sanitizer"
    probe, log = WORK / "sanitizer_probe", WORK / "logs" / "sanitizer_probe.txt"
    within = time.monotonic() + 120
    log.unlink(missing_ok=True)
    if run([nvcc, "-arch=native", "-o", str(probe), "benchmarks/sanitizer_probe.cu"], log, within) != 0:
        return f"the probe of compute-sanitizer does not compile, see {log}"
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), str(probe)]
        for planted, expected in (([name], FOUND), ([], 0)):
            code = run([*command, *planted], log, within)
            if code != expected:
                what = "a planted fault" if planted else "no fault"
                return f"compute-sanitizer --tool {name} ends with {code} where there is {what}, see {log}"
    return None


def _jobs() -> int:
    """Files of tests at a time: a process compiles in several threads."""
    return max(1, len(os.sched_getaffinity(0)) // 4)


def _told(stage: str, this: Run, steps: Sequence[Step], left: Sequence[str]) -> int:
    """Print how the stage stands, and return the exit code."""
    ended = {step.name: this.progress.steps[step.name] for step in steps if step.name in this.progress.steps}
    failed = [name for name, end in ended.items() if end["outcome"] == "failed"]
    seconds = sum(end["seconds"] for end in ended.values())
    passed = f"{len(ended) - len(failed)} of {len(steps)} passed"
    print(f"{stage}: {passed}, {len(failed)} failed, {seconds:.0f} s", flush=True)
    skipped = sum(int(number) for end in ended.values() for number in re.findall(r"(\d+) skipped", end["note"]))
    if skipped:
        print(f"  {skipped} tests skipped, for the reasons in {this.progress.directory / 'logs'}")
    for name in failed:
        print(f"  failed: {name}: {ended[name]['note']}")
    if left:
        print(f"  out of time; run the same command again for what is left: {', '.join(left)}")
    return 1 if failed else 0


def main() -> None:
    parser = Parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument("--stage", default="", help=f"one of {', '.join(STAGES)}; all of them if none is named")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="stop after this time")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tests and benchmarks with this in their path")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where <gpu>.json is written")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="where progress and logs are kept")
    arguments = parser.parse_args()
    if arguments.stage not in ("", *STAGES):
        raise ConfigError(f"--stage: expected one of {', '.join(STAGES)}, got {arguments.stage!r}")
    if arguments.device not in ("cuda", "cpu"):
        raise ConfigError(f"--device: expected cuda or cpu, got {arguments.device!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"there is no CUDA device for torch {torch.__version__}; --device cpu rehearses without one")
    if absent := missing():
        raise ConfigError(f"missing here: {', '.join(absent)}")
    for name in WANTED:
        if not _installed(name):
            print(f"{name} is not installed: what needs it is left out")
    source = fingerprint((*SOURCES, "tests"))
    this = Run(
        arguments.device,
        arguments.only,
        time.monotonic() + arguments.budget,
        Progress(arguments.work, source),
        arguments.results,
    )
    # Nothing can be tested that was not built; after that, a stage that fails does not keep the next from running.
    stages = ["build", *([arguments.stage] if arguments.stage not in ("", "build") else [])]
    stages = list(STAGES) if arguments.stage == "" else stages
    codes = []
    for name in stages:
        codes.append(STAGES[name](this))
        if name == "build" and not (this.progress.passed("compile") and this.progress.passed("load")):
            break
    sys.exit(max(codes))


if __name__ == "__main__":
    run_program(main)
