"""A run's directory: found again by its configuration, locked while it is written, every file whole or absent.

runs/00000-digits/
    config.json  stats.jsonl  samples/*.png  snapshot-*.safetensors  ema-*.safetensors  state-*.pt  tensorboard/*
    (with --parallel fsdp, state-* are directories)
    report.md  report.json  *.png
"""

import fcntl
import json
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from ctm_fast import __version__
from ctm_fast.errors import CheckpointError, ConfigError, DataError
from ctm_fast.files import atomic_write, write_text
from ctm_fast.training.config import STAGES, RunConfig, to_dict
from ctm_fast.training.shard_manifest import check_shards, read_about

KEPT_STATES = 2
TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
"""Copies of the files given."""


@dataclass
class RunDirectory:
    """The files of one run; with :meth:`open`, its lock is held while this object lives."""

    path: Path
    config: RunConfig
    _lock: IO[bytes] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, outdir: Path, config: RunConfig) -> "RunDirectory":
        """The newest run of exactly this configuration in ``outdir``, or a new one with the next number.

        Raises ConfigError if another process is writing that run, DataError if ``outdir`` cannot be written.
        """
        tree = to_dict(config)
        try:
            outdir.mkdir(parents=True, exist_ok=True)
            runs = _runs(outdir)
            same = [path for _, path in runs if _config_of(path) == tree]
            path = same[-1] if same else outdir / f"{runs[-1][0] + 1 if runs else 0:05d}-{config.preset}"
            (path / "samples").mkdir(parents=True, exist_ok=True)
            run = cls(path, config, (path / ".lock").open("ab"))
            run._take_lock()
            for leftover in list(path.rglob(".*.tmp")):  # of a process that was killed while it wrote
                _remove(leftover)
            if not same:
                run.write_json("config.json", {"ctm_fast": __version__, "config": tree})
        except OSError as error:
            raise DataError(f"--outdir: expected a directory that can be written, got {outdir}: {error}") from error
        return run

    def __del__(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def finished(self) -> bool:
        """Whether its report is written."""
        return (self.path / "report.md").exists()

    def write_json(self, name: str, content: Any) -> None:
        """Replace the file ``name``, whole or not at all."""
        text = json.dumps(content, indent=2) + "\n"
        write_text(self.path / name, text)

    def write_text(self, name: str, text: str) -> None:
        """Replace the file ``name``, whole or not at all."""
        write_text(self.path / name, text)

    def snapshot(self, stage: str, step: int) -> Path:
        """Where the weights of ``stage`` after ``step`` steps are kept."""
        return self.path / f"snapshot-{stage}-{step:06d}.safetensors"

    def last_snapshot(self, stage: str) -> Path:
        """Where the weights of ``stage`` after its last step are kept."""
        return self.snapshot(stage, self.config.steps(stage))

    @property
    def teacher(self) -> Path:
        """Where the run's teacher lies: its own last snapshot, or the copy of the one it was given."""
        given = self.config.teacher_sha256
        return self.path / TEACHER if given else self.snapshot("teacher", self.config.teacher.steps)

    def average(self, name: str, stage: str, step: int) -> Path:
        """Where the further average ``name`` of ``stage`` after ``step`` steps is kept."""
        return self.path / f"ema-{name.replace(':', '_')}-{stage}-{step:06d}.safetensors"

    def grid(self, stage: str, step: int, steps: int) -> Path:
        """Where the sample grid of ``stage`` after ``step`` steps is kept, of samples made in ``steps``."""
        several = f"-{steps}-steps" if stage != "teacher" and steps > 1 else ""
        return self.path / "samples" / f"{stage}-{step:06d}{several}.png"

    def save_state(self, state: dict[str, Any]) -> None:
        """Add a training state; the one before it stays, in case this one is damaged later."""
        name = f"state-{state['stage']}-{state['step']:06d}.pt"
        atomic_write(self.path / name, lambda file: _write_state(state, file))
        self.drop_old_states()

    def shards(self, stage: str, step: int) -> Path:
        """The directory of the state of ``stage`` after ``step`` steps that its ranks write together."""
        return self.path / f"state-{stage}-{step:06d}"

    def drop_old_states(self) -> None:
        """Remove the states that newer ones have made superfluous."""
        for path in self._states()[KEPT_STATES:]:
            self.remove_state(path)

    def remove_state(self, path: Path) -> None:
        """Remove the state in ``path``, if there is one, whole or not at all."""
        if path.is_dir():
            path = path.rename(path.with_name(f".{path.name}.tmp"))
        _remove(path)

    def last_state(self) -> tuple[Path, dict[str, Any]] | None:
        """The last saved state that is whole, and its file; None if none was saved.

        A damaged one is told of and passed over. Raises CheckpointError if there are states, and none is whole.
        """
        damaged = []
        for path in self._states():
            try:
                return path, self.read_state(path)
            except CheckpointError as error:
                damaged.append(error)
                print(f"{error}; going back to the one before", flush=True)
        if damaged:
            raise damaged[0]
        return None

    def _states(self) -> list[Path]:
        """Training states, the last first."""

        def place(path: Path) -> tuple[int, int]:
            _, stage, step = path.stem.split("-")
            return STAGES.index(stage), int(step)

        pattern = re.compile(rf"state-({'|'.join(STAGES)})-\d+(\.pt)?")
        return sorted((p for p in self.path.glob("state-*") if pattern.fullmatch(p.name)), key=place, reverse=True)

    def read_state(self, path: Path) -> dict[str, Any]:
        """The state in ``path``, read without unpickling code; CheckpointError unless it is a whole one of this run.

        Of a directory, only what it tells of itself: its weights are loaded by all ranks together.
        """
        state = self._told(path) if path.is_dir() else self._unpacked(path)
        if state["config"] != to_dict(self.config):
            raise CheckpointError(f"{path}: expected the state of a run of this configuration, got another's")
        return state

    def _told(self, path: Path) -> dict[str, Any]:
        check_shards(path)
        state = read_about(path)
        if not {"config", "stage", "step"} <= state.keys():
            raise CheckpointError(f"{path}: expected a training state of ctm_fast, got something else")
        return state

    def _unpacked(self, path: Path) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # on broken bytes it raises half a dozen types
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"{path}: not a whole training state: {type(error).__name__}: {reason}") from error
        if not isinstance(state, dict) or not {"config", "stage", "step", "weights"} <= state.keys():
            raise CheckpointError(f"{path}: expected a training state of ctm_fast, got something else")
        return state

    def prune(self, stage: str, keep: int) -> None:
        """Remove the snapshots of ``stage`` and its further averages but for the last ``keep``, a positive number."""
        pattern = re.compile(rf"(?:snapshot|ema-.+)-{stage}-(\d+)\.safetensors")
        steps = {path: int(match[1]) for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))}
        kept = sorted(set(steps.values()))[-keep:]
        for path, step in steps.items():
            if step not in kept:
                path.unlink()

    def append_stats(self, line: dict[str, Any]) -> None:
        """Add a line to stats.jsonl; it has "stage" and "step"."""
        with (self.path / "stats.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def stats(self) -> list[dict[str, Any]]:
        """The lines of stats.jsonl; a last one that a crash cut short is left out."""
        path = self.path / "stats.jsonl"
        lines = []
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def rewind_stats(self, done: dict[str, int]) -> None:
        """Drop lines of steps beyond ``done`` (stage -> steps): they are about to be made again.

        A line of figures is written after its steps, one about compiling before the step that it names is passed.
        """
        kept = [line for line in self.stats() if line["step"] + ("compile" in line) <= done.get(line["stage"], 0)]
        self.write_text("stats.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--outdir: run {self.path} is being written by another process") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_state(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk is hidden behind a message about positions in a zip
            raise error.__context__ from error
        raise


def _runs(outdir: Path) -> list[tuple[int, Path]]:
    """Numbers and paths in order. A directory without config.json is of a process killed at once: it is used again."""
    matches = [(re.fullmatch(r"(\d{5})-.+", path.name), path) for path in sorted(outdir.iterdir())]
    return [(int(match.group(1)), path) for match, path in matches if match and (path / "config.json").exists()]


def _config_of(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "config.json").read_text())["config"]
    except (OSError, KeyError, json.JSONDecodeError):
        return None
