"""Commands that are run once for the same sources: a killed or stopped run goes on with what is left."""

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import PATIENCE, last_lines, run
from ctm_fast.files import write_text


class Step(NamedTuple):
    name: str
    command: Sequence[str]
    environment: dict[str, str] = {}  # noqa: RUF012  # never written to


class Progress:
    """What was run for these sources and how it ended, in a file that is whole after each step.

    A step that passed is not run again; one that failed is, after those that were never run.
    """

    def __init__(self, directory: Path, source: str) -> None:
        self.directory = directory
        self.path = directory / "progress.json"
        self.lock = threading.Lock()
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = found.get("source") == source
        self.content: dict[str, Any] = found if same else {"source": source, "steps": {}}

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        return self.content["steps"]

    def passed(self, name: str) -> bool:
        return self.steps.get(name, {}).get("outcome") == "passed"

    def end(self, name: str, outcome: str, seconds: float, note: str) -> None:
        with self.lock:
            self.steps[name] = {"outcome": outcome, "seconds": round(seconds, 1), "note": note}
            self.directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.content, indent=1) + "\n"
            write_text(self.path, text)

    def log(self, name: str) -> Path:
        return self.directory / "logs" / (name.replace("/", ".").replace(" ", "-") + ".txt")

    def run(self, steps: Sequence[Step], deadline: float, jobs: int) -> list[str]:
        """Run the ``steps`` that have not passed, ``jobs`` at a time; return the names of those left."""
        todo = sorted((step for step in steps if not self.passed(step.name)), key=lambda step: step.name in self.steps)
        with ThreadPoolExecutor(jobs) as pool:
            ended = list(pool.map(lambda step: self._run(step, deadline), todo))
        return [step.name for step, end in zip(todo, ended, strict=True) if not end]

    def _run(self, step: Step, deadline: float) -> bool:
        """Whether the step came to an end."""
        begin = time.monotonic()
        if begin >= deadline:
            return False
        log = self.log(step.name)
        log.unlink(missing_ok=True)
        code = run(step.command, log, deadline, step.environment)
        seconds = time.monotonic() - begin
        if code is None and seconds < PATIENCE:
            return False
        note = f"interrupted after {seconds:.0f} s" if code is None else last_lines(log, 1).strip("= ")
        self.end(step.name, "passed" if code == 0 else "failed", seconds, note)
        if code != 0:
            print(f"{step.name} failed, all of it in {log}\n{last_lines(log, 15)}", flush=True)
        return True
