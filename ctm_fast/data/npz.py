"""``FILE.npz``: ``arr_0`` uint8 [N, H, W, C], ``arr_1`` integer [N]; the form of samples and reference batches."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.data.checks import NAMED, reading
from ctm_fast.data.images import Arrays
from ctm_fast.errors import DataError


def read_npz(path: Path, *, labels: bool) -> Arrays:
    """The arrays of ``path``, unchecked. Raises DataError for a file that is broken or lacks one."""
    with reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            there = ", ".join(map(repr, names[:NAMED]))
            raise DataError(f"data: {path}: expected the array arr_0, got {there or 'none'}")
        if labels and "arr_1.npy" not in names:
            raise DataError(f"labels: {path}: expected the array arr_1 for a conditional model, got only arr_0")
        return Arrays(path, _array(archive, "arr_0.npy"), _array(archive, "arr_1.npy") if labels else None)


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading to the end is also what has the checksum compared
            raise ValueError(f"{name} goes on after its array")
        return array
