"""The names that a pickle of weights may use, and what stands for each: tensors, containers, numpy, EDM's records."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ctm_fast.errors import CheckpointError
from ctm_fast.models.published.pickles import Admitted, shown
from ctm_fast.models.published.spans import Source, Span
from ctm_fast.models.published.tensors import MAX_DIMENSIONS, STORAGE_TYPES, Storage, StoredTensor

_NUMPY_TYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}


@dataclass
class ModuleRecord:
    """An object that EDM's ``torch_utils.persistence`` wrote, or a container of modules: a name and attributes."""

    class_name: str
    attributes: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        """Take the attributes, once."""
        if self.attributes is not None or not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f"the state of a {shown(self.class_name)} is no dictionary of attributes")
        self.attributes = state


@dataclass
class NumpyType:
    """The type of an array's elements."""

    dtype: torch.dtype

    def build(self, state: Any) -> None:
        """Take (version, byte order, ...): little-endian, or bytes that have no order."""
        match state:
            case (int(), "<" | "|", None, None, None, *_):
                return
        raise CheckpointError("a numpy type that is big-endian or structured")


@dataclass
class Array:
    """A numpy array; ``tensor`` once its state is there."""

    tensor: StoredTensor | None = None

    def build(self, state: Any) -> None:
        """Take (version, shape, type, whether Fortran's order, bytes)."""
        match state:
            case (int(), tuple(shape), NumpyType() as kind, bool(fortran), Span() as content) if self.tensor is None:
                self.tensor = _array_view(shape, kind, fortran, content)
            case _:
                raise CheckpointError("the state of a numpy array does not fit")


def _array_view(shape: tuple[Any, ...], kind: NumpyType, fortran: bool, content: Span) -> StoredTensor:
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise CheckpointError("a numpy array whose shape is no tuple of sizes")
    storage = Storage(kind.dtype, math.prod(shape))
    storage.place(content)
    stride, step = [], 1
    for size in shape if fortran else reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return StoredTensor(storage, 0, shape, tuple(stride if fortran else reversed(stride)))


def _misfit(name: str) -> CheckpointError:
    return CheckpointError(f"its pickle calls {name} with arguments that do not fit")


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case ():
            return {}
    raise _misfit("a dictionary")


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    match arguments:
        case ([],):  # with items, where sets have no opcodes of their own
            return set()
        case (list(items),) if all(isinstance(item, str | int) for item in items):
            return set(items)
    raise _misfit("set")


def _encode(arguments: tuple[Any, ...]) -> Span:
    """Bytes, as protocol 2 writes them: text whose code points they are."""
    match arguments:
        case (str(text), "latin1"):
            try:
                return Source(text.encode("latin-1")).span()
            except UnicodeEncodeError as error:
                raise _misfit("_codecs.encode") from error
    raise _misfit("_codecs.encode")


def _no_bytes(arguments: tuple[Any, ...]) -> Span:
    match arguments:
        case ():
            return Source(b"").span()
    raise _misfit("bytes")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple(size),):
            return size
    raise _misfit("torch.Size")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(stride), *_) if len(arguments) in (4, 6, 7):
            return StoredTensor(storage, offset, size, stride)
    raise _misfit("torch._utils._rebuild_tensor")


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as data, bool(), dict()):
            return data
    raise _misfit("torch._utils._rebuild_parameter")


def _persistent(arguments: tuple[Any, ...]) -> ModuleRecord:
    """The record of an object whose class's source is in the file as well: a text like any other, left alone."""
    match arguments:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            record = ModuleRecord(name)
            record.build(state)
            return record
        case ({"type": "class", "class_name": str(name), "state": None},):
            return ModuleRecord(name, {})
    raise _misfit("torch_utils.persistence._reconstruct_persistent_obj")


def _container(arguments: tuple[Any, ...]) -> ModuleRecord:
    match arguments:
        case ():
            return ModuleRecord("container")
    raise _misfit("a container of modules")


def _numpy_type(arguments: tuple[Any, ...]) -> NumpyType:
    match arguments:
        case (str(code), bool() | int(), bool() | int()) if code in _NUMPY_TYPES:
            return NumpyType(_NUMPY_TYPES[code])
    raise CheckpointError(f"a numpy type that is none of {', '.join(_NUMPY_TYPES)}")


def _array(arguments: tuple[Any, ...]) -> Array:
    match arguments:
        case (Admitted(name="numpy.ndarray"), (0,), Span(size=1) | "b"):
            return Array()
    raise _misfit("numpy's _reconstruct")


def _array_of_buffer(arguments: tuple[Any, ...]) -> Array:
    match arguments:
        case (Span() as content, NumpyType() as kind, tuple(shape), "C" | "F" as order):
            return Array(_array_view(shape, kind, order == "F", content))
    raise _misfit("numpy's _frombuffer")


def _scalar(arguments: tuple[Any, ...]) -> int | float | bool:
    match arguments:
        case (NumpyType() as kind, Span() as content):
            number: int | float | bool = _array_view((), kind, False, content).load().item()
            return number
    raise _misfit("numpy's scalar")


def _table(entries: Iterable[Admitted]) -> dict[str, Admitted]:
    return {entry.name: entry for entry in entries}


ADMITTED = _table(
    [
        Admitted("collections.OrderedDict", _empty_dict),
        *(Admitted(f"{module}.EasyDict", _empty_dict) for module in ("dnnlib", "dnnlib.util")),
        *(Admitted(f"{module}.set", _set) for module in ("builtins", "__builtin__")),
        *(Admitted(f"{module}.bytes", _no_bytes) for module in ("builtins", "__builtin__")),
        Admitted("_codecs.encode", _encode),
        Admitted("torch.Size", _size),
        Admitted("torch._utils._rebuild_tensor", _tensor),
        Admitted("torch._utils._rebuild_tensor_v2", _tensor),
        Admitted("torch._utils._rebuild_parameter", _parameter),
        *(Admitted(f"torch.{name}", value=dtype) for name, dtype in STORAGE_TYPES.items()),
        Admitted("torch_utils.persistence._reconstruct_persistent_obj", _persistent),
        *(Admitted(f"torch.nn.modules.container.{name}", _container) for name in ("ModuleDict", "ModuleList")),
        Admitted("torch.nn.modules.container.Sequential", _container),
        Admitted("numpy.dtype", _numpy_type),
        Admitted("numpy.ndarray"),
        *(Admitted(f"{numpy}.multiarray._reconstruct", _array) for numpy in ("numpy.core", "numpy._core")),
        *(Admitted(f"{numpy}.multiarray.scalar", _scalar) for numpy in ("numpy.core", "numpy._core")),
        *(Admitted(f"{numpy}.numeric._frombuffer", _array_of_buffer) for numpy in ("numpy.core", "numpy._core")),
    ]
)
"""``module.name`` -> what stands for it. A storage's type is its dtype."""
