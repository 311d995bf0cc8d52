"""Published weights on disk: found, checked and read without running anything that lies in the file."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.models.published import read_state_dict
from ctm_fast.models.published.tensors import StoredTensors

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
    tensors = read_state_dict(path)
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise CheckpointError(f"{path}: expected sha256 {sha256}, got {found}")
    return _checked(path, tensors, expected, tuple(unused))


def file_sha256(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(path: Path, tensors: StoredTensors, expected: Shapes, unused: tuple[str, ...]) -> dict[str, Tensor]:
    checked = {}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected:
            if name.startswith(unused):
                continue
            raise CheckpointError(f"{path}: tensor {name} is not in the network")
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        wanted, got = list(expected[name]), list(tensors.shape(name))
        if got != wanted:
            raise CheckpointError(f"{path}: tensor {name}: expected shape {wanted}, got {got}")
        checked[name] = tensors[name].float()
    return checked
