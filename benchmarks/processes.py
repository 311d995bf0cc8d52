"""A command in a process of its own that ends by a deadline."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recording import ROOT

GRACE = 10.0
"""Seconds that a process is given to end after it was interrupted."""


def run(command: Sequence[str], log: Path, deadline: float, environment: dict[str, str] | None = None) -> int | None:
    """Run ``command`` in the repository's root, its output in ``log``; its exit code, None if it ran out of time.

    ``deadline`` is by ``time.monotonic()``. A process that dies of a signal has its number, negative.
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
        )
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest takes down what its tests started
            return None
        finally:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_lines(log: Path, count: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
