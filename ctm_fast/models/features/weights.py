"""Published weights on disk: found, checked and read without running anything that lies in the file."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError

Shapes = Mapping[str, Sequence[int]]


def package_file(package: str, path: str, remedy: str) -> Path:
    """``path`` inside an installed top-level package, which is not imported.

    Raises ConfigError with ``remedy`` where the package or its file is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / path
        if file.is_file():
            return file
    what = "the package lacks it" if spec else "the package is not installed"
    raise ConfigError(f"expected {package}/{path}, but {what}: {remedy}")


def read_weights(
    path: str | Path, expected: Shapes, *, unused: Sequence[str] = (), sha256: str | None = None
) -> dict[str, Tensor]:
    """The float32 tensors of a state dict saved by PyTorch (or of one under its key ``model``), by name.

    Args:
        path: the file.
        expected: name -> shape of each tensor that is returned.
        unused: what further names may start with; they are left out.
        sha256: of the file, where it is known.

    Raises CheckpointError naming the file, and the tensor that is missing, left over or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        got = "a directory" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: expected a file of weights, got {got}")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise CheckpointError(f"{path}: expected sha256 {sha256}, got {found}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file may fail at any depth
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path}: not a file of weights that PyTorch can load: {reason}") from error
    if isinstance(tensors, Mapping) and isinstance(tensors.get("model"), Mapping):
        tensors = tensors["model"]
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(tensors).__name__}")
    return _checked(path, tensors, expected, tuple(unused))


def _checked(path: Path, tensors: Mapping[str, Any], expected: Shapes, unused: tuple[str, ...]) -> dict[str, Tensor]:
    for name in sorted(expected.keys() | {str(name) for name in tensors}):
        if name not in expected:
            if name.startswith(unused):
                continue
            raise CheckpointError(f"{path}: tensor {name} is not in the network")
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        wanted, tensor = list(expected[name]), tensors[name]
        if not isinstance(tensor, Tensor) or list(tensor.shape) != wanted:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: tensor {name}: expected shape {wanted}, got {got}")
    return {name: tensors[name].float() for name in expected}
