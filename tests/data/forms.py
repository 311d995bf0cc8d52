"""Data sets of every form, written as those who publish them write them, small."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(pixels: np.ndarray) -> Image.Image:
    """[H, W, C] or [H, W] in Pillow's form."""
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def write_npz(path: Path, *arrays: object) -> Path:
    np.savez(path, *arrays)
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(directory: Path, pixels: np.ndarray, labels: np.ndarray, prefix: str = "train") -> Path:
    write_idx(directory / f"{prefix}-images-idx3-ubyte.gz", pixels)
    write_idx(directory / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return directory


def write_zip(path: Path, images: Mapping[str, Image.Image | bytes], labels: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in images.items():
            archive.writestr(name, image if isinstance(image, bytes) else encoded(image))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def write_folder(path: Path, files: Mapping[str, Image.Image | bytes]) -> Path:
    for name, image in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(image if isinstance(image, bytes) else encoded(image))
    return path


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# CIFAR-10. Python 2's cPickle wrote its batches, at protocol 2: strings are U (length in a byte) or T (in four), and
# whatever is written gets a place in the memo (q, r).


class _CPickle:
    """The opcodes of cPickle for what a batch holds."""

    def __init__(self) -> None:
        self.places = 0

    def put(self) -> bytes:
        self.places += 1
        return b"q" + bytes([self.places]) if self.places < 256 else b"r" + struct.pack("<I", self.places)

    def string(self, value: bytes) -> bytes:
        start = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return start + value + self.put()

    def name(self, module: str, attribute: str) -> bytes:
        return f"c{module}\n{attribute}\n".encode() + self.put()

    def integer(self, value: int) -> bytes:
        if 0 <= value < 2**8:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 2**16 else b"J" + struct.pack("<i", value)

    def items(self, values: Iterable[bytes]) -> bytes:
        return b"]" + self.put() + b"(" + b"".join(values) + b"e"

    def array(self, array: np.ndarray) -> bytes:
        rebuilt = self.name("numpy.core.multiarray", "_reconstruct") + self.name("numpy", "ndarray")
        rebuilt += b"K\x00\x85" + self.put() + self.string(b"b") + b"\x87" + self.put() + b"R" + self.put()
        shape = b"".join(map(self.integer, array.shape)) + b"\x86" + self.put()
        kind = self.name("numpy", "dtype") + self.string(array.dtype.str[1:].encode())
        kind += b"K\x00K\x01\x87" + self.put() + b"R" + self.put()
        order = self.string(b"|" if array.dtype.itemsize == 1 else b"<")
        kind += b"(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + self.put() + b"b"
        return rebuilt + b"(K\x01" + shape + kind + b"\x89" + self.string(array.tobytes()) + b"t" + self.put() + b"b"


def cifar_pickle(data: np.ndarray, labels: Iterable[int], extra: bytes = b"") -> bytes:
    """A batch as cPickle wrote it; ``extra`` is opcodes that leave a key and a value."""
    labels = list(labels)
    write = _CPickle()
    content = b"\x80\x02}" + write.put() + b"("
    content += write.string(b"batch_label") + write.string(b"training batch 1 of 5")
    content += write.string(b"labels") + write.items(map(write.integer, labels))
    content += write.string(b"data") + write.array(data)
    content += write.string(b"filenames") + write.items(write.string(b"camion_s_%06d.png" % i) for i in labels)
    return content + extra + b"u."


def cifar_record(pixels: np.ndarray, label: int) -> bytes:
    """[32, 32, 3] as a record of the binary version."""
    return bytes([label]) + pixels.transpose(2, 0, 1).tobytes()


def cifar_batches(pixels: np.ndarray, labels: np.ndarray, form: str) -> dict[str, bytes]:
    """Name -> content of the archive's members; images [6 n, 32, 32, 3] in five batches and the test batch."""
    members = {}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, images, classes in zip(names, np.split(pixels, 6), np.split(labels, 6), strict=True):
        if form == "python":
            data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
            members[f"cifar-10-batches-py/{name}"] = cifar_pickle(data, classes.tolist())
        else:
            records = [cifar_record(image, label) for image, label in zip(images, classes.tolist(), strict=True)]
            members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(records)
    return members


def write_cifar(path: Path, members: Mapping[str, bytes]) -> Path:
    """The archive, in another order than that of the batches, as the published one is, and with its other files."""
    others = {"cifar-10-batches/batches.meta": b"\x80\x02}.", "cifar-10-batches/readme.html": b"<html>"}
    return write_tar(path, [*others.items(), *reversed(members.items())], "w:gz")
