"""``FILE.zip``, the form of StyleGAN and EDM: image files, ``dataset.json`` with their labels, and nothing else."""

import contextlib
import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from ctm_fast.data.checks import named, reading
from ctm_fast.data.dataset_json import FILE, check_suffixes, read_labels
from ctm_fast.data.decode import SUFFIXES
from ctm_fast.data.images import ImageFile, ImageFiles, Pixels
from ctm_fast.errors import DataError
from ctm_fast.files import atomic_write

_LARGEST = 2**28  # bytes of one file: a small archive may claim, and hold, any number of zeros


@contextlib.contextmanager
def open_zip(path: Path, *, labels: bool) -> Iterator[ImageFiles]:
    """The images of ``path`` in the order of their names. Raises DataError."""
    with reading(path):
        archive = zipfile.ZipFile(path)
    lock = threading.Lock()  # ZipFile counts its readers without one

    def read(name: str) -> bytes:
        if archive.getinfo(name).file_size > _LARGEST:
            raise ValueError(f"expected at most {_LARGEST} bytes, got {archive.getinfo(name).file_size}")
        with lock:
            return archive.read(name)

    with archive:
        names = sorted(name for name in archive.namelist() if name != FILE and not name.endswith("/"))
        check_suffixes(path, names, SUFFIXES)
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise DataError(f"data: {path}: expected each name once, got more of {named(twice)}")
        if labels and FILE not in archive.namelist():
            raise DataError(f"labels: {path}: expected {FILE} for a conditional model, got none")
        classes = read_labels(path, names, lambda: read(FILE)) if labels else None
        files = (ImageFile(name, partial(read, name)) for name in names)
        yield ImageFiles(path, len(names), files, classes)


def write_edm_zip(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """Write images [N, C, H, W] uint8, C 1 or 3, and labels [N] as the zip that StyleGAN, EDM and this package read.

    The file appears whole or not at all. Raises DataError where images or labels have another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images: expected uint8 [N, C, H, W] with C 1 or 3, got {images.dtype} {list(images.shape)}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
        raise DataError(f"labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    classes = None if labels is None else labels.tolist()
    atomic_write(path, lambda file: write_pngs(file, (png(image) for image in map(picture, pixels)), classes))


def picture(pixels: Pixels) -> Image.Image:
    """An image [H, W, C], C 1 or 3, in Pillow's form."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def png(image: Image.Image) -> bytes:
    """``image`` as PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def write_pngs(file: BinaryIO, pngs: Iterable[bytes], labels: Sequence[int] | None) -> None:
    """Write the zip of ``pngs``, one at a time, under names that sort in their order; the bytes tell no date.

    ``labels`` has one for each, or is None: then dataset.json says null.
    """
    names = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
        for i, content in enumerate(pngs):
            names.append(f"{i // 1000:05d}/img{i:08d}.png")
            archive.writestr(zipfile.ZipInfo(names[-1]), content)
        pairs = None if labels is None else list(zip(names, labels, strict=True))
        archive.writestr(zipfile.ZipInfo(FILE), json.dumps({"labels": pairs}))
