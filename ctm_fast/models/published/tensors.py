"""Tensors as files describe them: nothing is read before it is asked for, and nothing outside of its storage."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.published.pickles import shown
from ctm_fast.models.published.spans import Span

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""The name of a storage's class in ``torch`` -> its elements. Quantized and complex ones are not admitted."""

MAX_DIMENSIONS = 64
_INT64 = 2**63


@dataclass
class Storage:
    """``numel`` elements in a row. Legacy files tell where (``content``) only after the tensors that use them."""

    dtype: torch.dtype
    numel: int
    content: Span | None = None

    def place(self, content: Span) -> None:
        """Say where the elements are. Raises CheckpointError if the size is another."""
        if content.size != self.numel * self.dtype.itemsize:
            expected = f"{shown(str(self.numel))} elements of {self.dtype.itemsize} bytes"
            raise CheckpointError(f"a storage of {expected} lies in {content.size} bytes")
        self.content = content


@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage; sizes and strides in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises CheckpointError for a view that leaves its storage, or names more elements than it has."""
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or len(self.size) > MAX_DIMENSIONS:
            raise CheckpointError(f"a tensor of {len(self.size)} sizes and {len(self.stride)} strides")
        if not all(type(number) is int and 0 <= number < _INT64 for number in numbers):
            raise CheckpointError("a tensor's size, stride or offset is negative, too large or no integer")
        shape, stride = shown(str(list(self.size))), shown(str(list(self.stride)))
        if math.prod(max(size, 1) for size in self.size) >= _INT64:
            raise CheckpointError(f"a tensor of shape {shape}, whose strides no integer holds")
        if self.numel > self.storage.numel:
            raise CheckpointError(
                f"a tensor of shape {shape} is larger than its storage of {self.storage.numel} elements"
            )
        if self.numel and self.last >= self.storage.numel:
            raise CheckpointError(
                f"a tensor of shape {shape}, stride {stride} and offset {self.offset} leaves its "
                f"storage of {self.storage.numel} elements"
            )

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.size)

    @property
    def last(self) -> int:
        """Where in the storage the last element of a tensor that has some is."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    def load(self) -> Tensor:
        """The tensor in memory of its own, which spans from its first to its last element; strides are kept."""
        dtype = self.storage.dtype
        if not self.numel:
            return torch.empty(self.size, dtype=dtype)
        if self.storage.content is None:
            raise CheckpointError("a tensor whose storage is not in the file")
        count = self.last - self.offset + 1
        elements = torch.empty(count, dtype=dtype)
        content = self.storage.content.part(self.offset * dtype.itemsize, count * dtype.itemsize)
        content.read_into(elements.view(torch.uint8).numpy().data)
        return elements.as_strided(self.size, self.stride)


class StoredTensors(Mapping[str, Tensor]):
    """name -> tensor, each read afresh when it is asked for: a file of any size takes the memory of what is held of it.

    Raises CheckpointError naming the file where that has changed since.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]) -> None:
        self._path = path
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            return stored.load()
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{self._path}: {name}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        return tuple(self._stored[name].size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
