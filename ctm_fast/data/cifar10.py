"""``cifar-10-python.tar.gz`` and ``cifar-10-binary.tar.gz``, as www.cs.toronto.edu/~kriz/cifar.html gives them.

The pickles of the first are read as data (:mod:`ctm_fast.models.published.pickles`): nothing in them runs.
"""

import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ctm_fast.data.checks import named, reading
from ctm_fast.data.images import Arrays
from ctm_fast.data.tar import plain_members
from ctm_fast.errors import CheckpointError, DataError
from ctm_fast.models.published.names import ADMITTED, Array
from ctm_fast.models.published.pickles import Budget, PickleReader
from ctm_fast.models.published.spans import Source

SUFFIXES = (".tar.gz", ".tgz")
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_SHAPE = (3, 32, 32)
_BYTES = 3 * 32 * 32
_LARGEST = 2**28  # bytes of a batch; those of CIFAR-10 have 31 MB
_NUMPY = {
    name: ADMITTED[name]
    for name in (
        "_codecs.encode",  # how Python 3 writes bytes for Python 2
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
    )
}


def read_cifar10(path: Path, *, labels: bool, split: str) -> Arrays:
    """The images [N, 32, 32, 3] and labels of all training batches, in their order, or of the test batch.

    Batches may have any number of images. Raises DataError, also for a pickle that asks for more than an array.
    """
    wanted = _BATCHES[split]
    batches: dict[str, tuple[Any, Any]] = {}
    others = []
    with reading(path), tarfile.open(path, "r:gz") as tar:
        for member in plain_members(path, tar):
            name = PurePosixPath(member.name).name
            batch = name.removesuffix(".bin")
            if batch not in wanted:
                others.append(member.name)
                continue
            where = f"{path}: {member.name!r}"
            if batch in batches:
                raise DataError(f"data: {where}: expected each batch once, got {batch} again")
            if member.size > _LARGEST:
                raise DataError(f"data: {where}: expected at most {_LARGEST} bytes, got {member.size}")
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            batches[batch] = _binary(where, content) if name.endswith(".bin") else _pickled(where, content)
    missing = [batch for batch in wanted if batch not in batches]
    if missing:
        raise DataError(
            f"data: {path}: expected CIFAR-10's {', '.join(wanted)}, got no {', '.join(missing)}, "
            f"but {named(others) or 'nothing'}"
        )
    pixels = np.concatenate([batches[batch][0] for batch in wanted])
    classes = np.concatenate([batches[batch][1] for batch in wanted]) if labels else None
    return Arrays(path, pixels.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), classes)


def _binary(where: str, content: bytes) -> tuple[Any, Any]:
    """A record is a byte for the label and one for each pixel, channel by channel."""
    records, left = divmod(len(content), 1 + _BYTES)
    if left:
        raise DataError(f"data: {where}: expected records of {1 + _BYTES} bytes, got {left} over after {records}")
    table = np.frombuffer(content, np.uint8).reshape(records, 1 + _BYTES)
    return table[:, 1:], table[:, 0]


def _pickled(where: str, content: bytes) -> tuple[Any, Any]:
    """{"data": uint8 [N, 3072], "labels": list of N, ...}"""
    span = Source(content).span()
    try:
        with span.open() as file:
            batch = PickleReader(span, file, _NUMPY, None, Budget()).load()
        data = batch.get("data") if isinstance(batch, dict) else None
        pixels = data.tensor.load().numpy() if isinstance(data, Array) and data.tensor is not None else None
    except CheckpointError as error:
        raise DataError(f"data: {where}: {error}") from error
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _BYTES:
        got = "no array" if pixels is None else f"{pixels.dtype} {list(pixels.shape)}"
        raise DataError(f"data: {where}: expected data uint8 [N, {_BYTES}], got {got}")
    labels = batch.get("labels")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"labels: {where}: expected a list of {len(pixels)} integers")
    return pixels, np.array(labels, dtype=np.int64)
