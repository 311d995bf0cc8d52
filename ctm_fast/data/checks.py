"""What every data set must hold to, and how a message says that it does not."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.errors import DataError, reason

MAX_CLASSES = 65536
"""A label from here on is a mistake (a hash, a byte order), not a class to make a one-hot column for."""
NAMED = 3
"""How many offending files a message names."""


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn whatever a broken file makes its decoder raise into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on broken bytes they raise a dozen types, from zlib.error to tokenize.TokenError
        raise DataError(f"data: cannot read {what}: {reason(error)}") from error


def check_split(source: object, split: str, has_test: bool) -> None:
    """Raise DataError unless ``split`` is train, or test where ``source`` has one."""
    if split not in ("train", "test"):
        raise DataError(f"split: expected train or test, got {split!r}")
    if split == "test" and not has_test:
        raise DataError(f"split: expected train, as {source} has no test split, got test")


def check_pixels(path: Path, pixels: Any, resolution: int, channels: int | None) -> None:
    """Raise DataError unless ``pixels`` is uint8 [N, resolution, resolution, channels], N at least 1."""
    check_images(path, pixels)
    if pixels.shape[1:3] != (resolution, resolution):
        expected, got = size((resolution, resolution)), size(pixels.shape[1:3])
        raise DataError(f"data: {path}: expected images of {expected}, got {got}")
    if channels is not None and pixels.shape[3] != channels:
        raise DataError(f"data: {path}: expected {channels} channels, got {pixels.shape[3]}")


def check_images(path: Path, pixels: Any) -> None:
    """Raise DataError unless ``pixels`` is uint8 [N, H, W, C], N at least 1, C 1 or 3."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise DataError(f"data: {path}: expected uint8 [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    if len(pixels) == 0:
        raise DataError(f"data: {path}: expected at least one image, got none")
    if pixels.shape[3] not in (1, 3):
        raise DataError(f"data: {path}: expected 1 or 3 channels, got {pixels.shape[3]}")


def check_labels(path: Path, labels: Any, n: int) -> None:
    """Raise DataError unless ``labels`` is [n] integers in 0..MAX_CLASSES-1."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (n,):
        raise DataError(f"labels: {path}: expected integers [{n}], got {labels.dtype} {list(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
    if len(wrong):
        raise DataError(f"labels: {path}: expected 0 to {MAX_CLASSES - 1}, got {wrong[0]} ({len(wrong)} such)")


def size(shape: tuple[int, ...]) -> str:
    """``8x8x3``."""
    return "x".join(map(str, shape))


def named(names: Sequence[str]) -> str:
    """The first few, quoted: a name may hold a line break."""
    return few([repr(name) for name in names[:NAMED]], len(names))


def few(shown: Sequence[str], total: int) -> str:
    """Some of ``total`` things, and how many more there are."""
    left = total - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")
