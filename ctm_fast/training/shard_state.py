"""All that a stage goes on from, as named tensors in a directory of shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ctm_fast.training.shard_files import load_shards, optimizer_tensors, save_shards
from ctm_fast.training.shard_manifest import read_about
from ctm_fast.training.stage import Stage

_BLAMED = "blamed"


def save_state(directory: Path, stage: Stage, about: Mapping[str, Any]) -> None:
    """Write ``directory``, whole or not at all; every rank calls. Errors as of :func:`save_shards`."""
    blamed = [guard.state_dict()["blamed"] for guard in stage.guards()]
    save_shards(directory, _tensors(stage), {**about, _BLAMED: blamed})


def load_state(directory: Path, stage: Stage) -> None:
    """Continue from what :func:`save_state` wrote, on any number of ranks, sharded or not; every rank calls."""
    load_shards(directory, _tensors(stage))
    for guard, blamed in zip(stage.guards(), read_about(directory)[_BLAMED], strict=True):
        guard.load_state_dict({**guard.state_dict(), "blamed": blamed})


def _tensors(stage: Stage) -> dict[str, Tensor]:
    """References to every tensor of the state. Those of optimizers go by the names of parameters.

    An optimizer's own numbering is that of its groups, which are others where parameters are sharded.
    """
    optimizers = {name: (model, optimizer) for name, model, optimizer in stage.optimizers()}
    tensors: dict[str, Tensor] = {}
    for name, part in stage.state().items():
        found = optimizer_tensors(*optimizers[name]).items() if name in optimizers else _leaves(part)
        tensors |= {f"{name}.{key}": tensor for key, tensor in found}
    return tensors


def _leaves(tree: object) -> Iterator[tuple[str, Tensor]]:
    """(dotted key, tensor) of every tensor in nested dictionaries; storage has none without a dimension."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Tensor):
            yield key, value.view(1) if value.dim() == 0 else value
        else:
            yield from ((f"{key}.{rest}", tensor) for rest, tensor in _leaves(value))
