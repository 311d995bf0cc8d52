"""IDX, the form of MNIST and its successors: a directory of ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``."""

import gzip
import struct
from pathlib import Path

import numpy as np

from ctm_fast.data.checks import reading
from ctm_fast.data.images import Arrays, Pixels
from ctm_fast.errors import DataError

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
_PREFIX = {"train": "train", "test": "t10k"}


def is_idx(directory: Path) -> bool:
    """Whether it holds the images of a split."""
    return any((directory / f"{prefix}-images-idx3-ubyte.gz").is_file() for prefix in _PREFIX.values())


def read_idx(directory: Path, *, resolution: int | None, labels: bool, split: str) -> Arrays:
    """The images [N, H, W, 1] and the labels.

    Images of 28x28 are given at ``resolution`` 32 with two zeros added on each side, and at 16 as the mean of 2x2
    pixels of that, halves rounded to even; all others, and without a resolution, as they are. Raises DataError.
    """
    prefix = _PREFIX[split]
    pixels = _idx(directory / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    classes = _idx(directory / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1) if labels else None
    return Arrays(directory, _fit(pixels, resolution)[..., None], classes)


def _idx(path: Path, dimensions: int) -> Pixels:
    """The array of an IDX file of bytes: big-endian magic number 0x0800 + dimensions, the sizes, the bytes."""
    with reading(path), gzip.open(path) as file:
        data = file.read()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    if magic != 0x0800 + dimensions:
        raise DataError(f"data: {path}: expected IDX magic number {0x0800 + dimensions}, got {magic}")
    offset = 4 * (1 + dimensions)
    expected = int(np.prod(shape, dtype=object))
    if len(data) - offset != expected:
        raise DataError(f"data: {path}: expected {expected} bytes for shape {shape}, got {len(data) - offset}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape).copy()  # bytes are read-only, tensors are not


def _fit(pixels: Pixels, resolution: int | None) -> Pixels:
    if pixels.shape[1:] != (28, 28) or resolution not in (16, 32):
        return pixels
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    if resolution == 32:
        return padded
    quarters = padded.reshape(-1, 16, 2, 16, 2).sum((2, 4), dtype=np.uint16)
    halved: Pixels = np.rint(quarters / 4).astype(np.uint8)
    return halved
