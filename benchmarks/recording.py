"""The file of a machine's figures: whole after each benchmark, so that a killed run keeps what it measured.

* machine, versions, build, libraries: as ``python -m ctm_fast.report`` tells them
* source, commit, date, load before: what was measured (a hash of the sources, and their commit's name) and when
* results: benchmark -> its median and what stands beside it: rate, ceiling, share; medians and ratios of the ways
* failures: benchmark -> why it failed; a gate that found a default too slow has its figures in results as well
* files: file of benchmarks -> the seconds it took, once all of it is measured
* interrupted: the benchmarks that the deadline interrupted, each alone and for long
* running: the benchmark that was running when this was written, if one was
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, THREADS
from ctm_fast.files import write_text

RESULTS = Path(__file__).parent / "results"
SOURCES = ("ctm_fast", "csrc", "benchmarks", "setup.py", "CMakeLists.txt", "pyproject.toml")
OUT_OF_TIME = 75
"""Exit code of a process that records: the deadline came between two benchmarks."""
DEVICE_LOST = 76
"""Exit code: a benchmark left the GPU unusable to its process; the next ones need a new process."""
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml", ".npz"}


def fingerprint(paths: Iterable[str] = SOURCES) -> str:
    """A hash of the sources below ``paths``: what a figure belongs to, also where there is no git."""
    digest = hashlib.sha256()
    for top in paths:
        files = [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*"))
        for file in files:
            if file.suffix in SUFFIXES and file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit of the working tree, and whether it differs from it; "unknown" without git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES, ":!benchmarks/results")
    return (git("rev-parse", "HEAD") or "unknown") + (" with local changes" if changed else "")


def file_name(machine: dict[str, str]) -> str:
    """Of the GPU, or of the CPU and its usable cores: ``nvidia-h200.json``, ``amd-epyc-2-cores.json``."""
    gpu = machine.get("GPU 0", "").partition(",")[0]
    name = gpu or f"{machine['CPU']} {machine['cores'].split()[0]} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


class Recording:
    """The figures in the file ``path``, which must exist; written after each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text())

    @classmethod
    def open(cls, path: Path, values: dict[str, Any]) -> "Recording":
        """The recording at ``path`` if it is of these sources and this machine, else a new one with its header.

        ``values`` are those of ``ctm_fast.report``.
        """
        header = {key: values[key] for key in ("machine", "versions", "build", "libraries")}
        source = fingerprint()
        if path.exists():
            found = cls(path)
            if found.content.get("source") == source and all(found.content[key] == header[key] for key in header):
                return found
        started = {"commit": commit(), "date": datetime.now(UTC).isoformat(), "load before": os.getloadavg()[0]}
        path.parent.mkdir(parents=True, exist_ok=True)
        new = cls.__new__(cls)
        new.path = path
        new.content = {**header, "source": source, **started, "results": {}, "failures": {}, "files": {}}
        new._write()
        return new

    @classmethod
    def of_this_machine(cls, directory: Path = RESULTS) -> "Recording":
        """The recording of what ``python -m ctm_fast.report`` tells; a process of its own loads what was built last."""
        command = [sys.executable, "-m", "ctm_fast.report", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
        values = json.loads(done.stdout)
        return cls.open(directory / file_name(values["machine"]), values)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return self.content["results"]

    @property
    def failures(self) -> dict[str, str]:
        return self.content["failures"]

    @property
    def files(self) -> dict[str, float]:
        return self.content["files"]

    @property
    def running(self) -> str | None:
        return self.content.get("running")

    @property
    def count(self) -> int:
        """Benchmarks that were measured or failed."""
        return len(self.results.keys() | self.failures.keys())

    def has(self, name: str) -> bool:
        """Whether the benchmark ``name`` was measured or failed."""
        return name in self.results or name in self.failures

    def begin(self, name: str) -> None:
        self.content["running"] = name
        self._write()

    def end(self, name: str, figures: dict[str, Any] | None, failure: str | None) -> None:
        self.content.pop("running", None)
        if figures is not None:
            self.results[name] = figures
        if failure is not None:
            self.failures[name] = failure
        self._write()

    def interrupt(self, name: str, seconds: float) -> None:
        """The deadline came after ``name`` had run alone for so long; the second time, it has failed.

        The first time, much of what it compiled is in the compiler's cache for the second.
        """
        names = self.content.setdefault("interrupted", [])
        if name in names:
            self.end(name, None, f"interrupted twice, after {seconds:.0f} s")
        else:
            names.append(name)
            self._write()

    def finish(self, file: str, seconds: float) -> None:
        """All of ``file`` is measured; ``seconds`` are added to what it took before."""
        self.files[file] = round(self.files.get(file, 0.0) + seconds, 1)
        self._write()

    def reload(self) -> None:
        self.content = json.loads(self.path.read_text())

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
