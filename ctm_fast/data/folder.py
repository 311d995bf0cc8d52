"""A directory of image files: EDM's layout unpacked (with ``dataset.json``), or a folder for each class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.data.checks import named
from ctm_fast.data.dataset_json import FILE, check_suffixes, read_labels
from ctm_fast.data.decode import SUFFIXES
from ctm_fast.data.images import ImageFile, ImageFiles
from ctm_fast.errors import DataError


def open_folder(path: Path, *, labels: bool) -> ImageFiles:
    """The images below ``path`` in the order of their paths; links are followed.

    The labels are those of ``dataset.json``. Without one each image lies in the folder of its class, at any depth: its
    label is the place of the uppermost folder among all, in the order of their names, or of their numbers where all
    names are numbers (10 after 9). Raises DataError.
    """
    names = sorted(name for name in _walk(path, "", ()) if name != FILE)
    check_suffixes(path, names, SUFFIXES)
    classes = None
    if labels:
        listed = path / FILE
        classes = read_labels(path, names, listed.read_bytes) if listed.is_file() else _class_labels(path, names)
    files = (ImageFile(name, (path / name).read_bytes) for name in names)
    return ImageFiles(path, len(names), files, classes)


def has_images(path: Path) -> bool:
    """Whether any file below the directory ``path`` is an image by its name."""
    return any(name.lower().endswith(SUFFIXES) for name in _walk(path, "", ()))


def _walk(root: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """The paths of all files below ``root / prefix``, from ``root`` on."""
    stat = (root / prefix).stat()
    if (stat.st_dev, stat.st_ino) in above:
        raise DataError(f"data: {root}: expected folders, got a link to one that it lies in: {prefix!r}")
    above = (*above, (stat.st_dev, stat.st_ino))
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                yield from _walk(root, name, above)
            else:
                yield name


def _class_labels(path: Path, names: Sequence[str]) -> Any:
    homeless = [name for name in names if "/" not in name]
    if homeless:
        raise DataError(
            f"labels: {path}: expected {FILE}, or each image in the folder of its class, got {named(homeless)}"
        )
    classes = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    if all(name.isascii() and name.isdecimal() for name in classes):
        classes.sort(key=lambda name: (int(name), name))
    else:
        classes.sort()
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[name.partition("/")[0]] for name in names])
    empty = [
        name for name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True) if not count
    ]
    if empty:
        raise DataError(f"labels: {path}: expected images in the folder of each class, got none in {named(empty)}")
    return labels
