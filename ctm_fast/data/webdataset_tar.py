"""``FILE.tar``, webdataset's form: ``KEY.png`` (or .jpg, .jpeg, .webp) and, for the label, ``KEY.cls``.

Read by tarfile alone: the package ``webdataset`` would open URLs and run commands that stand in a path.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.data.checks import named, reading
from ctm_fast.data.decode import SUFFIXES
from ctm_fast.data.images import ImageFile, ImageFiles
from ctm_fast.data.tar import plain_members
from ctm_fast.errors import DataError

_LABEL_BYTES = 64


@dataclass
class _Sample:
    """What there is of one key."""

    images: list[tuple[str, Callable[[], bytes]]] = field(default_factory=list)
    labels: list[Callable[[], bytes]] = field(default_factory=list)


@contextlib.contextmanager
def open_webdataset(path: Path, shards: Sequence[Path], *, labels: bool) -> Iterator[ImageFiles]:
    """The samples of ``shards``, not compressed, one after another, in the order of their keys' first members.

    A key is a name up to the first dot after its last slash. Each has one image; members of other kinds are passed
    over. Raises DataError.
    """
    with contextlib.ExitStack() as stack:
        files: list[ImageFile] = []
        classes: list[int] = []
        for shard in shards:
            with reading(shard):
                samples = _samples(shard, stack)
            _check(shard, samples, labels)
            prefix = f"{shard.name}: " if len(shards) > 1 else ""
            files += [ImageFile(prefix + name, read) for sample in samples.values() for name, read in sample.images]
            if labels:
                with reading(shard):
                    classes += [_label(shard, key, sample.labels[0]()) for key, sample in samples.items()]
        yield ImageFiles(path, len(files), files, np.array(classes) if labels else None)


def _samples(shard: Path, stack: contextlib.ExitStack) -> dict[str, _Sample]:
    descriptor = os.open(shard, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    samples: dict[str, _Sample] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in plain_members(shard, tar):
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
            if f".{kind.lower()}" in SUFFIXES:
                sample.images.append((member.name, partial(_read, descriptor, member.offset_data, member.size)))
            elif kind.lower() == "cls":
                length = min(member.size, _LABEL_BYTES)
                sample.labels.append(partial(_read, descriptor, member.offset_data, length))
    return samples


def _read(descriptor: int, offset: int, length: int) -> bytes:
    content = os.pread(descriptor, length, offset)
    if len(content) != length:
        raise ValueError(f"expected {length} bytes, got {len(content)}")
    return content


def _check(shard: Path, samples: dict[str, _Sample], labels: bool) -> None:
    if not samples:
        raise DataError(f"data: {shard}: expected files KEY{SUFFIXES[0]} and KEY.cls, got none")
    odd = [key for key, sample in samples.items() if len(sample.images) != 1]
    if odd:
        raise DataError(f"data: {shard}: expected one image for each key, got none or several for {named(odd)}")
    unlabelled = [key for key, sample in samples.items() if len(sample.labels) != 1]
    if labels and unlabelled:
        raise DataError(
            f"labels: {shard}: expected one KEY.cls for each image, got none or several for {named(unlabelled)}"
        )


def _label(shard: Path, key: str, content: bytes) -> Any:
    match = re.fullmatch(rb"\s*(-?[0-9]{1,18})\s*", content)
    if not match:
        raise DataError(f"labels: {shard}: expected integers, got {content!r} for {key!r}")
    return int(match[1])
