"""The state of a training job in a directory, each rank writing its part, loaded by any number of ranks.

``torch.distributed.checkpoint`` with its safetensors storage: unlike its own format, no file of it is a pickle.
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ctm_fast.distributed import all_sum, of_first, wait_for_all
from ctm_fast.errors import CheckpointError
from ctm_fast.training.radam import RAdam
from ctm_fast.training.shard_manifest import checksum, shard_files, write_manifest


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that an Adam or RAdam remembers, by the names of the parameters: references, to save or to load into.

    What a first update would start from is filled in where there was none. The counter of updates is a [1].
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        counts_on_device = isinstance(optimizer, RAdam) or group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device if counts_on_device else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            for key, value in state.items():
                # Storage has no tensors without a dimension.
                tensors[f"{names[parameter]}.{key}"] = value.view(1) if value.dim() == 0 else value
    return tensors


def save_shards(directory: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write ``directory``, which does not exist yet, whole or not at all; returns on every rank when it is there.

    Every rank calls, with a ``directory`` that all can see and the same names; a DTensor is written in its shards,
    another tensor once. ``about`` is any JSON, for ``shard_manifest.read_about``; that of rank 0 counts.

    Raises CheckpointError on every rank if one could not write. A kill may leave a directory ``.NAME.tmp``, which the
    next call for that name removes.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    if _is_first():
        shutil.rmtree(temporary, ignore_errors=True)
    wait_for_all()
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}  # what safetensors asks for
    try:
        with _alone_or_not():
            save(contiguous, storage_writer=writer, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{directory}: could not be written: {_reason(error)}") from error
    checksums = _checksums(temporary)
    problem = ""
    if _is_first():
        try:
            write_manifest(temporary, about, checksums)
            _sync(temporary)
            temporary.rename(directory)
            _sync(directory.parent)
        except OSError as error:
            problem = str(error)
    if problem := of_first(problem):
        raise CheckpointError(f"{directory}: could not be written: {problem}")


def load_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into ``tensors`` what :func:`save_shards` wrote, on any number of ranks; every rank calls.

    Raises CheckpointError on every rank, naming the first tensor that is missing, in part or too much, or of another
    shape or dtype; nothing has been read then. Also for a file that is cut short.
    """
    reader = HuggingFaceStorageReader(str(directory))
    try:
        _check(directory, reader.read_metadata().state_dict_metadata, tensors)
        with _alone_or_not():
            load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: could not be read: {_reason(error)}") from error


def _check(directory: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            wanted, got = ("one", "none") if name not in found else ("none", "one")
            raise CheckpointError(f"{directory}: {name}: expected {wanted}, got {got}")
        there, tensor = found[name], expected[name]
        elements = sum(chunk.sizes.numel() for chunk in there.chunks)
        got = f"{elements} elements of {there.properties.dtype} {list(there.size)}"
        if (there.size, there.properties.dtype, elements) != (tensor.shape, tensor.dtype, tensor.numel()):
            raise CheckpointError(f"{directory}: {name}: expected {tensor.dtype} {list(tensor.shape)}, got {got}")


def _checksums(directory: Path) -> dict[str, int]:
    """Of every file; each rank reads its part of them."""
    files = shard_files(directory)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [checksum(file) if index % size == rank else 0 for index, file in enumerate(files)]
    total = all_sum(torch.tensor(mine, dtype=torch.float64))  # exact: they have 32 bits
    return {file.name: int(value) for file, value in zip(files, total.tolist(), strict=True)}


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def _alone_or_not() -> Iterator[None]:
    """Without PyTorch's warning that a process alone is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _reason(error: BaseException) -> str:
    """One line: of a failure on several ranks, the first."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {cause}"
    return str(error)


def _sync(directory: Path) -> None:
    """What was created or renamed in ``directory`` is on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
