"""A command in a process of its own, which ends by a deadline and does not outlive this one."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
THREADS = int(os.environ.get("CTM_FAST_BENCH_THREADS", "1"))
"""Threads of a CPU that benchmarks use: one by default, because two on a shared machine measure the neighbours."""
GRACE = 10.0
"""Seconds that something is given to come to its end."""
PATIENCE = 300.0
"""Seconds after which work that the deadline interrupts is held against it; before, it lacked time."""
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def run(command: Sequence[str], log: Path, deadline: float, environment: dict[str, str] | None = None) -> int | None:
    """Run ``command`` in the repository's root, its output in ``log``; its exit code, None if it ran out of time.

    ``deadline`` is by ``time.monotonic()``. The code of a process that dies of a signal is its number, negative.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # it makes one system call and no object
        )
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest takes down what its tests started
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def last_lines(log: Path, count: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
