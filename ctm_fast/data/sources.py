"""Which reader a data set's word or path asks for."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from ctm_fast.data import cifar10
from ctm_fast.data.checks import check_split
from ctm_fast.data.edm_zip import open_zip
from ctm_fast.data.folder import has_images, open_folder
from ctm_fast.data.idx import TRAIN_IMAGES, is_idx, read_idx
from ctm_fast.data.images import Arrays, ImageFiles
from ctm_fast.data.npz import read_npz
from ctm_fast.data.webdataset_tar import open_webdataset
from ctm_fast.errors import DataError

DIGITS = Path(__file__).with_name("digits.npz")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

WORDS = ("digits", "fashion-mnist")
_SHARDED = (".tar", ".parquet")
_EXPECTED = (
    "expected digits, fashion-mnist, a FILE.npz, a FILE.zip, a FILE.tar, a FILE.parquet, CIFAR-10's FILE.tar.gz, "
    f"a directory of images or a directory with {TRAIN_IMAGES}"
)


@contextlib.contextmanager
def open_source(
    source: str | Path, *, resolution: int | None, labels: bool, split: str
) -> Iterator[Arrays | ImageFiles]:
    """What ``source`` holds, as its reader found it; the forms are those of :func:`ctm_fast.data.load_dataset`.

    ``resolution`` matters to images of 28x28 in IDX files alone: :func:`ctm_fast.data.idx.read_idx`. Raises DataError.
    """
    path = _path(source)
    idx = is_idx(path)
    archive = path.name.lower().endswith(cifar10.SUFFIXES)
    shards = _shards(path)
    if path.exists():
        check_split(source, split, has_test=idx or archive or any(shard.name.startswith("test-") for shard in shards))
    if idx:
        yield read_idx(path, resolution=resolution, labels=labels, split=split)
    elif path.is_file() and path.suffix == ".npz":
        yield read_npz(path, labels=labels)
    elif path.is_file() and archive:
        yield cifar10.read_cifar10(path, labels=labels, split=split)
    elif path.is_file() and path.suffix == ".zip":
        with open_zip(path, labels=labels) as files:
            yield files
    elif shards:
        if path.is_dir():
            shards = [shard for shard in shards if shard.name.startswith(f"{split}-")]
        with _open_shards(path, shards, labels) as files:
            yield files
    elif path.is_dir() and has_images(path):
        yield open_folder(path, labels=labels)
    else:
        state = ", which holds no image" if path.is_dir() else "" if path.exists() else ", which does not exist"
        raise DataError(f"data: {_EXPECTED}, got {source}{state}")


def _path(source: str | Path) -> Path:
    if source == "digits":
        return DIGITS
    if source != "fashion-mnist":
        return Path(source)
    if not is_idx(FASHION_MNIST):
        raise DataError(
            f"data: fashion-mnist is not in {FASHION_MNIST}; run `apt-get install dataset-fashion-mnist`, "
            f"or give the directory that holds {TRAIN_IMAGES} with `--data DIR`"
        )
    return FASHION_MNIST


def _shards(path: Path) -> list[Path]:
    """``path`` itself if it is a .tar or .parquet, or the files ``train-*`` and ``test-*`` of one of the two in it."""
    if path.is_file() and path.suffix in _SHARDED:
        return [path]
    if not path.is_dir():
        return []
    found = {
        suffix: sorted(shard for split in ("train", "test") for shard in path.glob(f"{split}-*{suffix}"))
        for suffix in _SHARDED
    }
    if all(found.values()):
        raise DataError(f"data: {path}: expected {' or '.join(_SHARDED)}, got files of both kinds")
    return [shard for shards in found.values() for shard in shards]


def _open_shards(path: Path, shards: list[Path], labels: bool) -> contextlib.AbstractContextManager[ImageFiles]:
    if not shards:
        raise DataError(
            f"data: {path}: expected files train-*.tar or train-*.parquet, got only those of the test split"
        )
    if shards[0].suffix == ".tar":
        return open_webdataset(path, shards, labels=labels)
    try:
        parquet = importlib.import_module("ctm_fast.data.parquet")  # pyarrow need not be there, and takes a while
    except ImportError as error:
        raise DataError(f"data: {path}: {error}") from error
    opened: contextlib.AbstractContextManager[ImageFiles] = parquet.open_parquet(path, shards, labels=labels)
    return opened
