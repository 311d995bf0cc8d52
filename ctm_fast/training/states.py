"""The states that a run goes on from: a file, or with ``--parallel fsdp`` a directory that all ranks write into."""

import importlib
from pathlib import Path

from ctm_fast import __version__
from ctm_fast.distributed import of_first, together
from ctm_fast.errors import ConfigError
from ctm_fast.training.config import to_dict
from ctm_fast.training.execution import Execution
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.stage import Stage

_SHARDS = "ctm_fast.training.shard_state"
"""By its name: PyTorch's distributed checkpoints take seconds to import."""


def save_state(stage: Stage, run: RunDirectory | None, step: int) -> None:
    """Add the state of ``stage`` after ``step`` steps to the run, which the first rank has; every rank calls.

    Raises CheckpointError or OSError on every rank if one could not write.
    """
    about = {"ctm_fast": __version__, "config": to_dict(stage.config), "stage": stage.name, "step": step}
    state = stage.state()
    if not stage.execution.fsdp:
        together(lambda: run.save_state({**about, "weights": state}) if run else None)
        return
    directory = Path(of_first(run and str(run.shards(stage.name, step))))
    together(lambda: run.remove_state(directory) if run else None)  # a damaged one, if there is one
    importlib.import_module(_SHARDS).save_state(directory, stage, about)
    together(lambda: run.drop_old_states() if run else None)


def last_state(path: Path, run: RunDirectory | None, execution: Execution) -> tuple[Path, str, int] | None:
    """The last state in the run's directory ``path`` that is whole: where, its stage and step; every rank calls.

    Raises ConfigError if it cannot be gone on from with ``execution``; CheckpointError if none is whole.
    """
    found = together(lambda: run.last_state() if run else None)
    last = of_first(found and [str(found[0]), found[1]["stage"], found[1]["step"]])
    if last is None:
        return None
    state = Path(last[0])
    if execution.fsdp and state.is_file():
        raise ConfigError(f"--parallel: expected ddp, as when {state} was saved, got fsdp")
    return state, last[1], last[2]


def load_state(path: Path, stage: Stage) -> None:
    """Continue from the state in ``path``, saved by any number of ranks; every rank calls."""
    if path.is_dir():
        importlib.import_module(_SHARDS).load_state(path, stage)
    else:
        files = RunDirectory(path.parent, stage.config)
        stage.load_state(together(lambda: files.read_state(path))["weights"])
