"""``python -m benchmarks.record``: run all benchmarks and keep the figures of each as it ends.

Writes ``benchmarks/results/<machine>.json`` (see ``recording.py``). Killed, or out of ``--budget``, the same command
goes on with what is left, as long as the sources are the same; delete the file to measure again. A gate that finds a
default too slow, or a benchmark that fails, ends in exit code 1; the figures are kept all the same.

Each file of benchmarks runs in a process of its own: one that crashes takes one benchmark with it, not the others.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import table
from benchmarks.processes import GRACE, PATIENCE, ROOT, last_lines, run
from benchmarks.recording import DEVICE_LOST, OUT_OF_TIME, RESULTS, Recording
from ctm_fast.runtime import Parser
from ctm_fast.runtime import run as run_program

HERE = Path(__file__).parent
LOGS = ROOT / "build" / "benchmarks"
FIRST = ("bench_ceilings.py", "bench_block.py")
LAST = ("bench_cifar_network.py", "bench_unet.py", "bench_sample.py", "bench_sampler.py", "bench_train_step.py")


def benchmark_files(only: str = "") -> list[Path]:
    """The files of benchmarks whose name contains ``only``: the ceilings and the bet first, whole networks last."""
    files = sorted(path for path in HERE.glob("bench_*.py") if only in path.name)
    order = {name: rank for rank, name in enumerate(FIRST, -len(FIRST))} | dict.fromkeys(LAST, 1)
    return sorted(files, key=lambda path: order.get(path.name, 0))


def record(files: Sequence[Path], recording: Recording, deadline: float) -> list[str]:
    """Run the ``files`` that are not in ``recording`` until ``deadline`` (time.monotonic()); return what is left."""
    left = [file for file in files if file.name not in recording.files]
    while left and time.monotonic() < deadline and _measure(left[0], recording, deadline):
        del left[0]
    return [file.name for file in left]


def _measure(file: Path, recording: Recording, deadline: float) -> bool:
    """Run what is not recorded of ``file``; False if the deadline came first. Then no other benchmark begins."""
    log = LOGS / f"{file.stem}.txt"
    log.unlink(missing_ok=True)
    options = ["--benchmark-only", "-v", f"--record={recording.path}", f"--record-until={deadline}"]
    while True:
        known = recording.count
        begin = time.monotonic()
        code = run([sys.executable, "-m", "pytest", str(file), *options], log, deadline + GRACE)
        seconds = time.monotonic() - begin
        recording.reload()
        running = recording.running
        if code is None or code == OUT_OF_TIME:
            alone = recording.count == known
            if running is not None and code is None and alone and seconds > PATIENCE:
                recording.interrupt(running, seconds)
            return False
        if code in (0, 1, 5):  # all passed, some failed, none was left
            recording.finish(file.name, seconds)
            print(f"{file.name}: {_summary(log)}", flush=True)
            return True
        if running is not None:
            recording.end(running, None, _death(code))
        elif code != DEVICE_LOST:
            recording.end(file.name, None, f"{_death(code)}: {last_lines(log, 1)}")
        if recording.count == known or file.name in recording.failures:  # another process would do no better
            recording.finish(file.name, seconds)
            return True


def _death(code: int) -> str:
    return f"the process ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"


def _summary(log: Path) -> str:
    """pytest's last line."""
    return last_lines(log, 1).strip("= ")


def conclude(recording: Recording, left: Sequence[str]) -> int:
    """Print the figures, what failed and what is left; the exit code."""
    print(table(recording.content))
    print(f"wrote {recording.path}")
    for name, reason in recording.failures.items():
        print(f"failed: {name}: {reason}")
    if left:
        print(f"out of time; run the same command again for what is left: {', '.join(left)}")
    return 1 if recording.failures else 0


def main() -> None:
    parser = Parser("python -m benchmarks.record", __doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only files of benchmarks with this in their name")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop after this time")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where <machine>.json is written")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.budget
    recording = Recording.of_this_machine(arguments.results)
    sys.exit(conclude(recording, record(benchmark_files(arguments.only), recording, deadline)))


if __name__ == "__main__":
    run_program(main)
