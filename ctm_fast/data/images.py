"""The two ways in which a reader hands over what it found: whole arrays, or image files to be decoded one by one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""[H, W, C] of one image, [N, H, W, C] of many."""


@dataclass(frozen=True)
class Arrays:
    """``pixels`` [N, H, W, C] and ``labels`` [N] as a file holds them, or None where none were asked for."""

    path: Path
    pixels: Any
    labels: Any

    @property
    def count(self) -> int:
        """Of images."""
        return len(self.pixels)


@dataclass(frozen=True)
class ImageFile:
    """An image as its encoder left it; ``read`` gives its bytes, on any thread."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageFiles:
    """``count`` files, which may be gone through once, and their labels [count]: None where none were asked for."""

    path: Path
    count: int
    files: Iterable[ImageFile]
    labels: Any
