"""Where images go: a folder of PNGs or one .npz, which go on where they stopped; or a picture of all of them."""

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ctm_fast.errors import ConfigError, DataError
from ctm_fast.files import atomic_write, can_write_in, write_text
from ctm_fast.pictures import image_grid, save_png
from ctm_fast.serving.manifest import Manifest, beside, check_same, claim, write
from ctm_fast.serving.shards import Output, Pixels, Shard

SUFFIXES = {".png": "a .png", ".npz": "a .npz", "": "a folder"}
FLAT = 1000
"""Images; a folder of more is divided, as EDM does it, by the seed's thousands."""
_POLL = 0.1  # seconds


def open_output(out: Path, manifest: Manifest, *, images: int, ranks: int = 1) -> Output:
    """The output that the suffix of ``out`` asks for; nothing is written before the first images are made.

    ``NAME/``
        ``seed000123.png``, or ``000000/seed000123.png`` if there are more than 1,000, and ``dataset.json`` with their
        classes: a data set in EDM's layout. ``NAME.json`` beside it is the manifest.
    ``NAME.npz``
        ``arr_0`` uint8 [N, H, W, C], ``seeds`` int64 [N], of a conditional model ``arr_1`` int64 [N], its classes.
        ``NAME.npz.json`` beside it is the manifest. Until it is whole its shards lie in ``NAME.npz.parts``.
    ``NAME.png``
        all of them in one picture, made in one go and anew.

    Raises ConfigError where there is no place for it, or where another run's images are.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out: expected a .png, a .npz or a folder, got {out}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: expected a place in a directory that exists, got {out}")
    if out.exists() and out.is_dir() != (out.suffix == ""):
        got = "a folder" if out.is_dir() else "a file"
        raise ConfigError(f"--out: expected {SUFFIXES[out.suffix]}, got {got}: {out}")
    if not out.resolve().name:
        raise ConfigError(f"--out: expected a folder below the root, got {out}")
    for folder in {out.resolve().parent, out if out.is_dir() else out.parent}:  # the manifest lies beside
        if not can_write_in(folder):
            raise ConfigError(f"--out: expected a place in a directory that can be written to, got {out}")
    if out.suffix == "":
        return Folder(out.resolve(), manifest, divided=images > FLAT)
    if out.suffix == ".npz":
        return Arrays(out, manifest)
    if ranks > 1:
        raise ConfigError(f"--out: expected a folder or a .npz for {ranks} ranks, got {out}")
    return Grid(out)


class Folder(Output):
    """A PNG for each seed, in the folder ``path`` itself or ``divided`` into folders of a thousand seeds."""

    def __init__(self, path: Path, manifest: Manifest, *, divided: bool) -> None:
        self._path, self._manifest, self._divided = path, manifest, divided
        self._beside = beside(path)
        # In this order: another rank may be claiming the folder now, and it writes the manifest before any image.
        taken = path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir())
        if self._beside.exists():
            check_same(self._beside, manifest)
        elif taken:
            raise ConfigError(f"--out: expected an empty folder or one of this run, got neither: {path}")

    def has(self, shard: Shard) -> bool:
        return all(self._file(seed).exists() for seed in shard.seeds)

    def write(self, shard: Shard, images: Pixels) -> None:
        claim(self._beside, self._manifest)
        self._path.mkdir(exist_ok=True)
        files = [self._file(seed) for seed in shard.seeds]
        for folder in {file.parent for file in files}:
            folder.mkdir(exist_ok=True)
            _remove_leftovers(folder, {file.name for file in files})
        for image, file in zip(images, files, strict=True):
            save_png(image_grid(image[None], columns=1), file)

    def finish(self, shards: Sequence[Shard]) -> None:
        """Write the classes of all images; those of other ranks need not be there yet."""
        labels = None
        if shards[0].labels is not None:
            pairs = (
                (seed, label) for shard in shards for seed, label in zip(shard.seeds, shard.labels or (), strict=True)
            )
            labels = [[str(self._file(seed).relative_to(self._path)), label] for seed, label in pairs]
        _remove_leftovers(self._path, {"dataset.json"})
        text = json.dumps({"labels": labels})
        write_text(self._path / "dataset.json", text)

    def _file(self, seed: int) -> Path:
        folder = self._path / f"{seed - seed % 1000:06d}" if self._divided else self._path
        return folder / f"seed{seed:06d}.png"


class Arrays(Output):
    """One .npz; a file for each shard until the first rank, having waited for all of them, joins them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._parts = path.with_name(f"{path.name}.parts")
        self._beside = beside(path)
        if path.exists() and not self._beside.exists():
            raise ConfigError(f"--out: expected a file that is not there or of this run, got neither: {path}")
        for place in (self._beside if path.exists() else None, self._parts / "manifest.json"):
            if place is not None and place.exists():
                check_same(place, manifest)

    def has(self, shard: Shard) -> bool:
        # In this order: the parts are removed after the whole is there.
        return self._part(shard).exists() or self._path.exists()

    def write(self, shard: Shard, images: Pixels) -> None:
        if self._path.exists():
            return
        self._parts.mkdir(exist_ok=True)
        claim(self._parts / "manifest.json", self._manifest)
        arrays = {"arr_0": images, "seeds": np.array(shard.seeds, np.int64)}
        if shard.labels is not None:
            arrays["arr_1"] = np.array(shard.labels, np.int64)
        atomic_write(self._part(shard), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def finish(self, shards: Sequence[Shard]) -> None:
        """Wait for the shards of other ranks, join all in the order of the seeds, and remove them."""
        if not self._path.exists():
            for shard in shards:
                while not self._part(shard).exists():
                    time.sleep(_POLL)
            _remove_leftovers(self._path.parent, {self._path.name, self._beside.name})
            write(self._beside, self._manifest)
            try:
                atomic_write(self._path, lambda file: self._join(file, shards))
            except FileNotFoundError:
                if not self._path.exists():  # a rank whose torchrun was killed goes on, and may have been quicker
                    raise
        shutil.rmtree(self._parts, ignore_errors=True)

    def _join(self, file: BinaryIO, shards: Sequence[Shard]) -> None:
        """The bytes of np.savez, without holding more than one shard in memory."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in ("arr_0", "seeds") if shards[0].labels is None else ("arr_0", "arr_1", "seeds"):
                first = self._read(shards[0], name)
                shape = (sum(len(shard.seeds) for shard in shards), *first.shape[1:])
                header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for shard in shards:
                        member.write(self._read(shard, name).tobytes())

    def _read(self, shard: Shard, name: str) -> NDArray[Any]:
        path = self._part(shard)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                array: NDArray[Any] = arrays[name]
                if arrays["seeds"].tolist() != list(shard.seeds) or len(array) != len(shard.seeds):
                    raise ValueError("it holds other seeds")
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: expected a shard of this run; remove it and run again: {error}") from error
        return array

    def _part(self, shard: Shard) -> Path:
        return self._parts / f"part{shard.index:06d}.npz"


class Grid(Output):
    """All images in one picture, ten in a row or as a square; none is kept until all are made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._images: list[Pixels] = []

    def has(self, shard: Shard) -> bool:
        return False

    def write(self, shard: Shard, images: Pixels) -> None:
        self._images.append(images)

    def finish(self, shards: Sequence[Shard]) -> None:
        images = np.concatenate(self._images)
        columns = 10 if len(images) % 10 == 0 else max(1, round(len(images) ** 0.5))
        save_png(image_grid(images, columns=columns, scale=max(1, 32 // images.shape[1])), self._path)


def _remove_leftovers(folder: Path, names: Container[str]) -> None:
    """Delete what processes left in ``folder`` that were killed while they wrote files of these ``names``.

    One that lives, such as a rank that went on when its torchrun was killed, keeps its own.
    """
    for leftover in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.([0-9]+)\.tmp", leftover.name)
        if match and match[1] in names and not _is_alive(int(match[2])):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
