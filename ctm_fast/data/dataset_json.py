"""``dataset.json`` of StyleGAN and EDM: {"labels": [[name, label], ...]}, or null for no labels."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.data.checks import NAMED, named, reading
from ctm_fast.errors import DataError

FILE = "dataset.json"


def read_labels(path: Path, names: Sequence[str], read: Callable[[], bytes]) -> Any:
    """The label of each image of ``path``, by its name; ``read`` gives the file's bytes.

    Raises DataError where it is broken, holds no labels, or none for some image, or anything but integers.
    """
    with reading(f"{path}: {FILE}"):
        pairs = json.loads(read())["labels"]
        if pairs is None:
            raise DataError(f"labels: {path}: expected labels for a conditional model, got null in {FILE}")
        label_of = dict(pairs)
    missing = [name for name in names if name not in label_of]
    if missing:
        there = ", ".join(map(repr, missing[:NAMED]))
        raise DataError(
            f"labels: {path}: expected a label for each of {len(names)} images, got none for {len(missing)}: {there}"
        )
    odd = [f"{label_of[name]!r} for {name!r}" for name in names if type(label_of[name]) is not int]
    if odd:
        raise DataError(f"labels: {path}: expected integers, got {', '.join(odd[:NAMED])}")
    return np.array([label_of[name] for name in names])


def check_suffixes(path: Path, names: Sequence[str], suffixes: Sequence[str]) -> None:
    """Raise DataError unless all files of ``path`` but dataset.json are images by their names, and there are some."""
    foreign = [name for name in names if Path(name).suffix.lower() not in suffixes]
    if foreign or not names:  # none is passed over: it may be an image under a name that did not survive
        expected, got = ", ".join(suffixes), named(foreign) or "no image"
        raise DataError(f"data: {path}: expected files {expected} and {FILE}, got {got}")
