"""Published files, whatever their format: names, tensors, what the model was built with, who published it."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.checkpoint import FORMAT
from ctm_fast.models.published.modules import edm_config, state_dict
from ctm_fast.models.published.names import Array, ModuleRecord
from ctm_fast.models.published.pickles import Budget, shown
from ctm_fast.models.published.spans import Source, Span
from ctm_fast.models.published.tensors import Storage, StoredTensor, StoredTensors
from ctm_fast.models.published.torch_files import LEGACY_START, read_legacy, read_raw, read_tar, read_zip
from ctm_fast.models.safetensors_file import DTYPES

OPENAI = "openai/consistency_models"
EDM_LICENCE = "CC BY-NC-SA 4.0 (NVlabs/edm): not for commercial use"
_PUBLISHERS = (
    ("time_embed_s.", "sony/ctm", "not for commercial use; see the licence of sony/ctm"),
    ("time_embed.", OPENAI, f"MIT ({OPENAI})"),
    ("map_layer0_s.", "Kim-Dongjun/ctm-cifar10", "not for commercial use; see the licence of Kim-Dongjun/ctm-cifar10"),
    ("map_layer0.", "NVlabs/edm", EDM_LICENCE),
)
"""What names of tensors begin with (after ``model.``) -> who publishes such files, and under which licence."""

_MAX_HEADER = 2**22  # of a .safetensors file: 40 times that of the largest published network
_MOST_SHARING = 4  # how often a file's bytes may be named, by tensors that share a storage


@dataclass(frozen=True)
class PublishedFile:
    """The weights of a published file under the names they were published with.

    ``tensors`` reads each when it is asked for, so that holding the file takes no memory; ``shapes`` are the same on
    the meta device, for which nothing is read. ``config`` is what the model was built with, where the file says so
    (EDM's pickles; safetensors of ``python -m ctm_fast.convert``), else None. ``publisher`` is told by the names;
    ``licence`` is what weights of that publisher come with, in words.
    """

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Tensor]
    config: dict[str, Any] | None
    publisher: str
    licence: str
    sha256: str


def read_published(path: str | Path, *, entry: str | None = None) -> PublishedFile:
    """Read EDM's ``.pkl``, a ``.pt`` of torch.save in any of its three formats, or ``.safetensors``; nothing is run.

    Args:
        path: the file. Its numbers are little-endian.
        entry: which entry of the file's dictionary holds the model; by default ``ema`` where there is one, else the
            dictionary itself.

    Raises CheckpointError naming the file, and what in it is truncated, malicious, or of another kind.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"expected a file, got {'a directory' if path.is_dir() else 'no such file'}")
        source = Source(path)
        span = source.span()
        start = span.part(0, min(span.size, 512)).read()
        if _is_safetensors(start, span.size):
            stored, config, licence = _read_safetensors(path, span)
        else:
            stored, config = _model(_read_pickled(start, span), entry)
            licence = None
        if sum(tensor.numel * tensor.storage.dtype.itemsize for tensor in stored.values()) > _MOST_SHARING * span.size:
            raise CheckpointError("its tensors together are larger than the file, many times over")
        publisher, usual = _publisher(stored, config)
        with source.open() as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    shapes = {
        name: torch.empty(tensor.size, dtype=tensor.storage.dtype, device="meta") for name, tensor in stored.items()
    }
    return PublishedFile(StoredTensors(path, stored), shapes, config, publisher, licence or usual, sha256)


def read_state_dict(path: str | Path) -> StoredTensors:
    """The tensors of a state dict, or of the one under its key ``model``, whatever network's.

    Each is read when it is asked for; a file may say that a tensor is far larger than it is itself, so ask for its
    shape first.

    Args:
        path: a file of torch.save in any of its three formats, or ``.safetensors``; nothing in it is run.

    Raises CheckpointError as :func:`read_published` does, but for a network that is not known.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(
                f"expected a file of weights, got {'a directory' if path.is_dir() else 'no such file'}"
            )
        span = Source(path).span()
        start = span.part(0, min(span.size, 512)).read()
        if _is_safetensors(start, span.size):
            stored, _, _ = _read_safetensors(path, span)
        else:
            value = _read_pickled(start, span)
            nested = isinstance(value, dict) and isinstance(value.get("model"), dict)
            stored, _ = _model(value, "model" if nested else None)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return StoredTensors(path, stored)


def _read_pickled(start: bytes, span: Span) -> Any:
    budget = Budget()
    if start.startswith(b"PK"):
        return read_zip(span, budget)
    if start[257:262] == b"ustar":
        return read_tar(span, budget)
    if start.startswith(LEGACY_START):
        return read_legacy(span, budget)
    if start.startswith(b"\x80"):
        return read_raw(span, budget)
    raise CheckpointError("expected a pickle, a file of torch.save or .safetensors, got none of them")


def _model(value: Any, entry: str | None) -> tuple[dict[str, StoredTensor], dict[str, Any] | None]:
    """The tensors and the configuration of the model in what was pickled."""
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a dictionary, got a {type(value).__name__}")
    if entry is None and "ema" in value:
        entry = "ema"
    if entry is not None:
        if entry not in value:
            raise CheckpointError(f"expected an entry {entry!r}, got {shown(', '.join(map(str, value)))}")
        value = value[entry]
    if isinstance(value, ModuleRecord):
        return state_dict(value), edm_config(value)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"expected a dictionary of tensors, got a {type(value).__name__} of none")
    return {name: _tensor(name, item) for name, item in value.items()}, None


def _tensor(name: Any, value: Any) -> StoredTensor:
    tensor = value.tensor if isinstance(value, Array) else value
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
        raise CheckpointError(f"expected names of tensors, got {shown(str(name))}")
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(f"expected a dictionary of tensors, got {name}, a {type(value).__name__}")
    return tensor


def _publisher(stored: Mapping[str, StoredTensor], config: Mapping[str, Any] | None) -> tuple[str, str]:
    names = [name.removeprefix("model.") for name in stored]
    for prefix, publisher, licence in _PUBLISHERS:
        if any(name.startswith(prefix) for name in names):
            return publisher, licence
    raise CheckpointError(f"holds no network that is known: its tensors are {', '.join(list(stored)[:3])}, ...")


def _is_safetensors(start: bytes, size: int) -> bool:
    """Whether it begins with the length of a header that fits, and the header."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path, span: Span) -> tuple[dict[str, StoredTensor], dict[str, Any] | None, str | None]:
    """Tensors, configuration and licence, as far as the metadata has them."""
    length = int.from_bytes(span.part(0, 8).read(), "little")
    if length > _MAX_HEADER:
        raise CheckpointError(f"a .safetensors file with a header of {length} bytes")
    try:
        with safe_open(path, framework="pt") as file:  # holds the header against the file
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"not a complete .safetensors file: {error}") from error
    if metadata.get("format") == FORMAT:
        raise CheckpointError("is a model of ctm_fast already; its published names are written with --to published")
    header = json.loads(span.part(8, length).read())
    stored = {}
    for name, entry in header.items():
        if name != "__metadata__":
            stored[name] = _tensor(name, _safetensor(entry, span.part(8 + length, span.size - 8 - length)))
    return stored, _json(metadata.get("config")), metadata.get("licence")


def _safetensor(entry: dict[str, Any], data: Span) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"a tensor of type {shown(str(entry['dtype']))}")
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    storage = Storage(DTYPES[entry["dtype"]], math.prod(shape))
    storage.place(data.part(start, end - start))
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return StoredTensor(storage, 0, tuple(shape), tuple(stride))


def _json(text: str | None) -> dict[str, Any] | None:
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the configuration in its metadata is no JSON") from error
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"the configuration in its metadata is no object, but a {type(value).__name__}")
    return value
