"""A run's directory: found again by its configuration, locked while it is written, every file whole or absent.

runs/00000-digits/
    config.json  stats.jsonl  samples/*.png  snapshot-*.safetensors  training-state.pt
    report.md  report.json  *.png
"""

import fcntl
import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ctm_fast import __version__
from ctm_fast.errors import CheckpointError, ConfigError, DataError
from ctm_fast.files import atomic_write
from ctm_fast.training.config import RunConfig, to_dict


@dataclass
class RunDirectory:
    """The files of one run; the lock is held while this object lives."""

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
            for leftover in path.rglob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            if not same:
                run.write_json("config.json", {"ctm_fast": __version__, "config": tree})
        except OSError as error:
            raise DataError(f"--outdir: expected a directory that can be written, got {outdir}: {error}") from error
        return run

    @property
    def finished(self) -> bool:
        """Whether its report is written."""
        return (self.path / "report.md").exists()

    def write_json(self, name: str, content: Any) -> None:
        """Replace the file ``name``, whole or not at all."""
        text = json.dumps(content, indent=2) + "\n"
        atomic_write(self.path / name, lambda file: file.write(text.encode()))

    def write_text(self, name: str, text: str) -> None:
        """Replace the file ``name``, whole or not at all."""
        atomic_write(self.path / name, lambda file: file.write(text.encode()))

    def snapshot(self, stage: str, step: int) -> Path:
        """Where the weights of ``stage`` after ``step`` steps are kept."""
        return self.path / f"snapshot-{stage}-{step:06d}.safetensors"

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the training state; after a crash either this one or the one before is there, whole."""
        atomic_write(self.path / "training-state.pt", lambda file: torch.save(state, file))

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state, or None. Read without unpickling code; CheckpointError if it is damaged."""
        path = self.path / "training-state.pt"
        if not path.exists():
            return None
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
        if state["config"] != to_dict(self.config):
            raise CheckpointError(f"{path}: expected the state of a run of this configuration, got another's")
        return state

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


def _runs(outdir: Path) -> list[tuple[int, Path]]:
    """Numbers and paths in order. A directory without config.json is of a process killed at once: it is used again."""
    matches = [(re.fullmatch(r"(\d{5})-.+", path.name), path) for path in sorted(outdir.iterdir())]
    return [(int(match.group(1)), path) for match, path in matches if match and (path / "config.json").exists()]


def _config_of(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "config.json").read_text())["config"]
    except (OSError, KeyError, json.JSONDecodeError):
        return None
