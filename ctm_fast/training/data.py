"""The images to train on: read whole into memory as uint8, and drawn in an order that a resumed run finds again."""

import contextlib
import functools
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ctm_fast.errors import DataError
from ctm_fast.files import atomic_write
from ctm_fast.training.config import MAX_CLASSES

DIGITS = Path(__file__).with_name("digits.npz")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_IDX_IMAGES, _IDX_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMED = 3  # how many offending files a message names

Pixels = NDArray[np.uint8]  # [N, H, W, C]
Labels = NDArray[np.int64]  # [N]


@dataclass(frozen=True)
class ImageDataset:
    """Images [N, C, H, W] uint8 and, for a conditional model, labels [N] int64 in 0..num_classes-1.

    Without labels ``labels`` is None and ``num_classes`` 0. ``name`` is the data set's word, or its file's stem.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    num_classes: int


def load_dataset(source: str | Path, *, resolution: int, channels: int | None = None, labels: bool) -> ImageDataset:
    """Read a data set, whichever of these ``source`` is:

    ``digits``
        1,797 handwritten digits 8x8 in grey, from scikit-learn; they come with the package.
    ``fashion-mnist``
        Debian's package dataset-fashion-mnist: 60,000 articles of clothing 28x28 in grey.
    a directory
        the two ``train-*-ubyte.gz`` files of MNIST and its successors (IDX). Images of 28x28 are also given at 32
        (two zeros added on each side) and at 16 (that, then the mean of 2x2 pixels, halves rounded to even).
    ``FILE.npz``
        ``arr_0`` uint8 [N, H, W, C], ``arr_1`` integer [N]; the form of samples and reference batches.
    ``FILE.zip``
        the form of StyleGAN and EDM: image files, in the order of their names, ``dataset.json``
        ``{"labels": [[name, label], ...]}``, and nothing else.

    Args:
        source: a word from above or a path; the word wins over a path of that name (write ``./digits``).
        resolution: the height and width that the images must have; but for the rule above nothing is resized.
        channels: 1 or 3; None takes either.
        labels: whether to read the labels, which then must be there for every image.

    Raises:
        DataError: one line that says what was expected and what is there instead.
    """
    path, pixels, classes = _read(source, resolution, labels)
    _check_pixels(path, pixels, resolution, channels)
    name = str(source) if source in ("digits", "fashion-mnist") else path.stem
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    if classes is None:
        return ImageDataset(name, images, None, 0)
    _check_labels(path, classes, len(pixels))
    return ImageDataset(name, images, torch.from_numpy(classes.astype(np.int64)), int(classes.max()) + 1)


def write_edm_zip(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """Write images [N, C, H, W] uint8, C 1 or 3, and labels [N] as the zip that StyleGAN, EDM and this package read.

    The file appears whole or not at all. Raises DataError where images or labels have another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images: expected uint8 [N, C, H, W] with C 1 or 3, got {images.dtype} {list(images.shape)}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
        raise DataError(f"labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(pixels))]

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
            for name, image in zip(names, pixels, strict=True):
                png = io.BytesIO()
                Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(png, "PNG")
                archive.writestr(zipfile.ZipInfo(name), png.getvalue())
            pairs = None if labels is None else list(zip(names, labels.tolist(), strict=True))
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": pairs}))

    atomic_write(path, write)


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Labels:
    """The order [n], int64, read-only, in which epoch number ``epoch`` visits ``n`` samples.

    The ranks of n raw 64-bit words of Philox with key (seed, 2^63 + epoch), which no generator of
    ``diffusion/draws.py`` has. NumPy keeps raw words the same from release to release, and its ``permutation`` not, so
    that an old run resumes under a new NumPy.
    """
    words = np.random.Philox(key=np.array([seed, 2**63 + epoch], dtype=np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices [batch_size] int64 of the samples of training step ``step``, counted from 0.

    One endless stream of shuffled epochs is cut into batches, so that a batch may straddle epochs. It is a function
    of its arguments alone: a run resumed at a step continues at the very sample.

    Raises ValueError for n or batch_size below 1, or a negative step.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("step", step, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        first = epoch * n
        pieces.append(epoch_order(n, seed, epoch)[max(start - first, 0) : stop - first])
    return torch.from_numpy(np.concatenate(pieces))


def _read(source: str | Path, resolution: int, labels: bool) -> tuple[Path, Any, Any]:
    """Where the data are, their pixels and their labels, by what ``source`` is; checked by the caller."""
    if source == "digits":
        return DIGITS, *_read_npz(DIGITS, labels)
    path = FASHION_MNIST if source == "fashion-mnist" else Path(source)
    if source == "fashion-mnist" and not (path / _IDX_IMAGES).is_file():
        raise DataError(
            f"data: fashion-mnist is not in {path}; run `apt-get install dataset-fashion-mnist`, "
            f"or give the directory that holds {_IDX_IMAGES} with `--data DIR`"
        )
    if (path / _IDX_IMAGES).is_file():
        return path, *_read_idx(path, resolution, labels)
    if path.is_file() and path.suffix == ".npz":
        return path, *_read_npz(path, labels)
    if path.is_file() and path.suffix == ".zip":
        return path, *_read_zip(path, resolution, labels)
    raise DataError(
        f"data: expected digits, fashion-mnist, a FILE.npz, a FILE.zip or a directory with {_IDX_IMAGES}, "
        f"got {source}{'' if path.exists() else ', which does not exist'}"
    )


@contextlib.contextmanager
def _reading(what: str | Path) -> Iterator[None]:
    """Turn whatever a broken file makes its decoder raise into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on broken bytes they raise a dozen types, from zlib.error to tokenize.TokenError
        reason = " ".join(str(error).split())
        raise DataError(f"data: cannot read {what}: {type(error).__name__}: {reason}") from error


def _read_npz(path: Path, labels: bool) -> tuple[Any, Any]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            raise DataError(f"data: {path}: expected the array arr_0, got {_named(names) or 'none'}")
        if labels and "arr_1.npy" not in names:
            raise DataError(f"labels: {path}: expected the array arr_1 for a conditional model, got only arr_0")
        return _array(archive, "arr_0.npy"), _array(archive, "arr_1.npy") if labels else None


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading to the end is also what has the checksum compared
            raise ValueError(f"{name} goes on after its array")
        return array


def _read_idx(directory: Path, resolution: int, labels: bool) -> tuple[Any, Any]:
    pixels = _idx(directory / _IDX_IMAGES, dimensions=3)
    classes = _idx(directory / _IDX_LABELS, dimensions=1) if labels else None
    return _fit_idx(pixels, resolution)[..., None], classes


def _idx(path: Path, dimensions: int) -> Pixels:
    """The array of an IDX file of bytes: big-endian magic number 0x0800 + dimensions, the sizes, the bytes."""
    with _reading(path), gzip.open(path) as file:
        data = file.read()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    if magic != 0x0800 + dimensions:
        raise DataError(f"data: {path}: expected IDX magic number {0x0800 + dimensions}, got {magic}")
    offset = 4 * (1 + dimensions)
    expected = int(np.prod(shape, dtype=object))
    if len(data) - offset != expected:
        raise DataError(f"data: {path}: expected {expected} bytes for shape {shape}, got {len(data) - offset}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape).copy()  # bytes are read-only, tensors are not


def _fit_idx(pixels: Pixels, resolution: int) -> Pixels:
    """28x28 at 32 (zero-padded) and at 16 (the mean of 2x2 of that, halves to even); all else as it is."""
    if pixels.shape[1:] != (28, 28) or resolution not in (16, 32):
        return pixels
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    if resolution == 32:
        return padded
    quarters = padded.reshape(-1, 16, 2, 16, 2).sum((2, 4), dtype=np.uint16)
    halved: Pixels = np.rint(quarters / 4).astype(np.uint8)
    return halved


def _read_zip(path: Path, resolution: int, labels: bool) -> tuple[Any, Any]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name != "dataset.json" and not name.endswith("/"))
        foreign = [name for name in names if Path(name).suffix.lower() not in _IMAGE_SUFFIXES]
        if foreign or not names:  # none is passed over: it may be an image under a name that did not survive
            expected, got = ", ".join(_IMAGE_SUFFIXES), _named(foreign) or "no image"
            raise DataError(f"data: {path}: expected files {expected} and dataset.json, got {got}")
        classes = _zip_labels(path, archive, names) if labels else None
        return _zip_pixels(path, archive, names, resolution), classes


def _zip_pixels(path: Path, archive: zipfile.ZipFile, names: list[str], resolution: int) -> Pixels:
    first = _decode(path, archive, names[0])
    expected = (resolution, resolution, first.shape[2])
    pixels = np.empty((len(names), *expected), np.uint8)
    misfits = []
    for i, name in enumerate(names):
        image = _decode(path, archive, name)
        if image.shape == expected:
            pixels[i] = image
            continue
        misfits.append(f"{name!r} ({_size(image.shape)})")
        if len(misfits) == _NAMED:  # a million images of the wrong size are known after three
            break
    if misfits:
        raise DataError(f"data: {path}: expected images of {_size(expected)}, got {', '.join(misfits)}")
    return pixels


def _decode(path: Path, archive: zipfile.ZipFile, name: str) -> Pixels:
    with (
        _reading(f"{path}: {name!r}"),
        archive.open(name) as file,
        Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image,
    ):
        if image.mode not in ("L", "RGB"):
            raise DataError(f"data: {path}: expected 8-bit grey or RGB, got mode {image.mode} in {name!r}")
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _zip_labels(path: Path, archive: zipfile.ZipFile, names: list[str]) -> Any:
    if "dataset.json" not in archive.namelist():
        raise DataError(f"labels: {path}: expected dataset.json for a conditional model, got none")
    with _reading(f"{path}: dataset.json"):
        pairs = json.loads(archive.read("dataset.json"))["labels"]
        if pairs is None:
            raise DataError(f"labels: {path}: expected labels for a conditional model, got null in dataset.json")
        label_of = dict(pairs)
    missing = [name for name in names if name not in label_of]
    if missing:
        raise DataError(
            f"labels: {path}: expected a label for each of {len(names)} images, "
            f"got none for {len(missing)}: {_named(missing)}"
        )
    odd = [f"{label_of[name]!r} for {name!r}" for name in names if type(label_of[name]) is not int]
    if odd:
        raise DataError(f"labels: {path}: expected integers, got {', '.join(odd[:_NAMED])}")
    return np.array([label_of[name] for name in names])


def _check_pixels(path: Path, pixels: Any, resolution: int, channels: int | None) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise DataError(f"data: {path}: expected uint8 [N, H, W, C], got {pixels.dtype} {list(pixels.shape)}")
    if len(pixels) == 0:
        raise DataError(f"data: {path}: expected at least one image, got none")
    if pixels.shape[1:3] != (resolution, resolution):
        expected, got = _size((resolution, resolution)), _size(pixels.shape[1:3])
        raise DataError(f"data: {path}: expected images of {expected}, got {got}")
    if pixels.shape[3] not in ((1, 3) if channels is None else (channels,)):
        raise DataError(f"data: {path}: expected {channels or '1 or 3'} channels, got {pixels.shape[3]}")


def _check_labels(path: Path, labels: Any, n: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (n,):
        raise DataError(f"labels: {path}: expected integers [{n}], got {labels.dtype} {list(labels.shape)}")
    wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
    if len(wrong):
        raise DataError(f"labels: {path}: expected 0 to {MAX_CLASSES - 1}, got {wrong[0]} ({len(wrong)} such)")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _named(names: list[str]) -> str:
    """The first few, quoted: a name may hold a line break."""
    return ", ".join(map(repr, names[:_NAMED]))
