"""Data sets of every form are read exactly, bad ones refused in one line."""

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast.data import load_dataset, sources, write_edm_zip
from ctm_fast.errors import DataError
from tests.data.forms import write_mnist, write_npz, write_zip

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 2, 1, 0, 2])


def grey(size: int, value: int = 0) -> Image.Image:
    return Image.new("L", (size, size), value)


# The data sets


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="the original comes with scikit-learn")
    original = datasets.load_digits()
    digits = load_dataset("digits", resolution=8, channels=1, labels=True)
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    np.testing.assert_array_equal(digits.images[:, 0].numpy(), np.rint(original.images * (255 / 16)))
    np.testing.assert_array_equal(digits.labels.numpy(), original.target)
    assert (digits.name, digits.num_classes, digits.labels.dtype) == ("digits", 10, torch.int64)


def test_digits_without_labels():
    digits = load_dataset("digits", resolution=8, labels=False)
    assert digits.labels is None
    assert digits.num_classes == 0


def test_npz(tmp_path):
    read = load_dataset(write_npz(tmp_path / "mine.npz", PIXELS, LABELS), resolution=8, labels=True)
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS)
    np.testing.assert_array_equal(read.labels.numpy(), LABELS)
    assert (read.name, read.num_classes) == ("mine", 3)
    assert read.images.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3])
def test_zip_round_trip(tmp_path, channels):
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)[:, :channels]
    path = tmp_path / "mine.zip"
    write_edm_zip(path, images, torch.from_numpy(LABELS))
    read = load_dataset(path, resolution=8, channels=channels, labels=True)
    assert torch.equal(read.images, images)
    assert read.labels.tolist() == LABELS.tolist()
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[1] == "00000/img00000001.png"
        assert json.loads(archive.read("dataset.json"))["labels"][1] == ["00000/img00000001.png", 0]


def test_zip_without_labels_is_for_unconditional_models(tmp_path):
    write_edm_zip(tmp_path / "mine.zip", torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert load_dataset(tmp_path / "mine.zip", resolution=8, labels=False).labels is None
    with pytest.raises(DataError, match=r"labels: .*expected labels for a conditional model, got null"):
        load_dataset(tmp_path / "mine.zip", resolution=8, labels=True)


def test_zip_is_in_the_order_of_names_and_labels_go_by_name(tmp_path):
    images = {f"{i}.png": grey(8, i) for i in (2, 0, 1)}
    path = write_zip(tmp_path / "mine.zip", images, [["1.png", 11], ["2.png", 12], ["0.png", 10]])
    read = load_dataset(path, resolution=8, labels=True)
    assert read.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert read.labels.tolist() == [10, 11, 12]


def test_idx_at_28_32_and_16(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    pixels[0, :2, :4] = [[0, 1, 1, 2], [0, 1, 1, 2]]  # means 0.5 and 1.5: both halves, both to even
    write_mnist(tmp_path, pixels, np.arange(5, dtype=np.uint8))
    plain, padded, halved = (load_dataset(tmp_path, resolution=r, labels=True) for r in (28, 32, 16))
    assert plain.images[:, 0].tolist() == pixels.tolist()
    assert padded.images[:, 0, 2:30, 2:30].tolist() == pixels.tolist()
    assert int(padded.images.int().sum()) == int(pixels.astype(int).sum())
    assert halved.images[0, 0, 1, 1:3].tolist() == [0, 2]
    expected = torch.nn.functional.avg_pool2d(padded.images.double(), 2).round()
    assert torch.equal(halved.images.double(), expected)
    assert halved.labels.tolist() == [0, 1, 2, 3, 4]
    assert halved.num_classes == 5


def test_fashion_mnist():
    if not sources.FASHION_MNIST.is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    fashion = load_dataset("fashion-mnist", resolution=16, channels=1, labels=True)
    assert fashion.images.shape == (60000, 1, 16, 16)
    assert fashion.labels.bincount().tolist() == [6000] * 10


def test_the_test_split_of_idx(tmp_path):
    write_mnist(tmp_path, np.zeros((3, 8, 8), np.uint8), np.zeros(3, np.uint8))
    pixels = np.random.default_rng(3).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    write_mnist(tmp_path, pixels, np.array([1, 4], np.uint8), "t10k")
    read = load_dataset(tmp_path, resolution=8, labels=True, split="test")
    assert read.images[:, 0].tolist() == pixels.tolist()
    assert read.labels.tolist() == [1, 4]
    assert len(load_dataset(tmp_path, resolution=8, labels=True).images) == 3


def test_no_other_split_is_made_up(tmp_path):
    with pytest.raises(DataError, match=r"^split: expected train, as digits has no test split, got test$"):
        load_dataset("digits", resolution=8, labels=True, split="test")
    write_npz(tmp_path / "a.npz", PIXELS)
    write_zip(tmp_path / "a.zip", {"0.png": grey(8)}, None)
    (tmp_path / "folder").mkdir()
    grey(8).save(tmp_path / "folder" / "0.png")
    for source in ("a.npz", "a.zip", "folder"):
        with pytest.raises(DataError, match=f"^split: expected train, as .*{source} has no test split"):
            load_dataset(tmp_path / source, resolution=8, labels=False, split="test")
        with pytest.raises(DataError, match=r"^split: expected train or test, got 'val'$"):
            load_dataset(tmp_path / source, resolution=8, labels=False, split="val")


def test_fashion_mnist_absent_says_where_from(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*--data DIR"):
        load_dataset("fashion-mnist", resolution=16, labels=True)


# What is refused

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such path": (lambda d: d / "none.npz", "none.npz, which does not exist"),
    "a directory of something else": (lambda d: d, "or a directory with train-images-idx3-ubyte.gz, got "),
    "npz of another size": (
        lambda d: write_npz(d / "a.npz", PIXELS[:, :6], LABELS),
        "expected images of 8x8, got 6x8",
    ),
    "npz of floats": (lambda d: write_npz(d / "a.npz", PIXELS / 255, LABELS), r"expected uint8 .*, got float64 \["),
    "npz without C": (lambda d: write_npz(d / "a.npz", PIXELS[..., 0], LABELS), r"got uint8 \[7, 8, 8\]"),
    "npz with two channels": (lambda d: write_npz(d / "a.npz", PIXELS[..., :2], LABELS), "1 or 3 channels, got 2"),
    "npz without images": (lambda d: write_npz(d / "a.npz", PIXELS[:0], LABELS[:0]), "at least one image, got none"),
    "npz without labels": (lambda d: write_npz(d / "a.npz", PIXELS), "expected the array arr_1 for a conditional"),
    "npz with too few labels": (
        lambda d: write_npz(d / "a.npz", PIXELS, LABELS[:5]),
        r"labels: .*expected integers \[7\], got int64 \[5\]",
    ),
    "npz with float labels": (lambda d: write_npz(d / "a.npz", PIXELS, LABELS / 2), r"integers \[7\], got float64"),
    "npz with negative labels": (
        lambda d: write_npz(d / "a.npz", PIXELS, LABELS - 1),
        r"0 to 65535, got -1 \(2 such\)",
    ),
    "npz with huge labels": (lambda d: write_npz(d / "a.npz", PIXELS, LABELS + 65534), "got 65536"),
    "npz of objects": (
        lambda d: write_npz(d / "a.npz", np.array([{}, 1], dtype=object), LABELS),
        "cannot read .*Object arrays cannot be loaded",
    ),
    "zip with labels missing": (
        lambda d: write_zip(d / "a.zip", {f"{i}.png": grey(8) for i in range(9)}, [["0.png", 1]]),
        "a label for each of 9 images, got none for 8: '1.png', '2.png', '3.png'$",
    ),
    "zip with labels that are vectors": (
        lambda d: write_zip(d / "a.zip", {"0.png": grey(8)}, [["0.png", [0.5]]]),
        r"expected integers, got \[0.5\] for '0.png'",
    ),
    "zip with a label past int64": (
        lambda d: write_zip(d / "a.zip", {"0.png": grey(8)}, [["0.png", 2**63]]),
        "expected 0 to 65535, got 9223372036854775808",
    ),
    "zip of mixed sizes": (
        lambda d: write_zip(d / "a.zip", {f"{i}.png": grey(8 + i // 2) for i in range(9)}, []),
        r"expected images of 8x8x1, got '2.png' \(9x9x1\), '3.png' \(9x9x1\), '4.png' \(10x10x1\) "
        r"and 4 more \(7 of 9 images\); `python -m ctm_fast.dataset` resizes and converts$",
    ),
    "zip of mixed modes": (
        lambda d: write_zip(d / "a.zip", {"0.png": grey(8), "1.png": Image.new("RGB", (8, 8))}, []),
        r"expected images of 8x8x1, got '1.png' \(8x8x3\)",
    ),
    "zip with a palette": (
        lambda d: write_zip(d / "a.zip", {"0.png": Image.new("P", (8, 8))}, []),
        "8-bit grey or RGB, got mode P in '0.png'",
    ),
    "zip without images": (lambda d: write_zip(d / "a.zip", {}, []), "and dataset.json, got no image"),
    "zip with another file": (
        lambda d: write_zip(d / "a.zip", {"0.png": grey(8), "0\n.bmp": grey(8)}, []),
        "expected files .png, .jpg, .jpeg, .webp and dataset.json, got '0\\\\n.bmp'",
    ),
    "idx of a size not made fit": (
        lambda d: write_mnist(d, np.zeros((2, 27, 27), np.uint8), np.zeros(2, np.uint8)),
        "expected images of 8x8, got 27x27",
    ),
    "idx with too few labels": (
        lambda d: write_mnist(d, np.zeros((2, 8, 8), np.uint8), np.zeros(1, np.uint8)),
        r"expected integers \[2\], got uint8 \[1\]",
    ),
    "idx of another rank": (
        lambda d: write_mnist(d, np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.uint8)),
        "magic number 2051, got 2052",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path, case):
    write, message = REFUSED[case]
    source = write(tmp_path)
    conditional = not case.startswith("zip of") and case != "zip with a palette"
    with pytest.raises(DataError, match=message) as error:
        load_dataset(source, resolution=8, labels=conditional)
    assert "\n" not in str(error.value)


def test_wrong_channels_and_resolution_are_named():
    with pytest.raises(DataError, match="expected 3 channels, got 1"):
        load_dataset("digits", resolution=8, channels=3, labels=True)
    with pytest.raises(DataError, match="expected images of 16x16, got 8x8"):
        load_dataset("digits", resolution=16, labels=True)


def test_idx_with_a_byte_more_or_less(tmp_path):
    write_mnist(tmp_path, np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    for wrong in (content[:-1], content + b"\0"):
        path.write_bytes(gzip.compress(wrong))
        with pytest.raises(DataError, match=f"expected 128 bytes for shape .*, got {len(wrong) - 16}"):
            load_dataset(tmp_path, resolution=8, labels=True)


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(PIXELS))
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(path, resolution=8, labels=True)


def test_npz_with_an_array_that_goes_on(tmp_path):
    array = io.BytesIO()
    np.save(array, PIXELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue() + b"x")
    with pytest.raises(DataError, match=r"cannot read .*: ValueError: arr_0.npy goes on after its array"):
        load_dataset(tmp_path / "a.npz", resolution=8, labels=False)


def test_npz_with_a_header_that_is_no_python(tmp_path):
    array = io.BytesIO()
    np.save(array, PIXELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue().replace(b"}", b"("))
    with pytest.raises(DataError, match="cannot read"):
        load_dataset(tmp_path / "a.npz", resolution=8, labels=False)


@pytest.mark.parametrize("form", ["npz", "zip", "idx"])
def test_truncated_at_any_place(tmp_path, form):
    if form == "idx":
        source, path = tmp_path, tmp_path / "train-images-idx3-ubyte.gz"
        write_mnist(tmp_path, PIXELS[..., 0], LABELS.astype(np.uint8))
    else:
        source = path = tmp_path / f"a.{form}"
        if form == "npz":
            np.savez_compressed(path, PIXELS, LABELS)
        else:
            write_edm_zip(path, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="cannot read") as error:
            load_dataset(source, resolution=8, labels=True)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["npz", "zip", "idx"])
def test_flipped_bytes_give_a_data_error_or_the_data(tmp_path, form):
    """No other exception escapes, and checksums of zip and gzip keep wrong pixels out."""
    if form == "idx":
        source, path = tmp_path, tmp_path / "train-images-idx3-ubyte.gz"
        write_mnist(tmp_path, PIXELS[..., 0], LABELS.astype(np.uint8))
    else:
        source = path = tmp_path / f"a.{form}"
        if form == "npz":
            np.savez_compressed(path, PIXELS, LABELS)
        else:
            write_edm_zip(path, torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
    content = path.read_bytes()
    whole = load_dataset(source, resolution=8, labels=True)
    generator = np.random.default_rng(2)
    refused = 0
    for _ in range(300):
        broken = bytearray(content)
        broken[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        path.write_bytes(broken)
        try:
            read = load_dataset(source, resolution=8, labels=True)
        except DataError:
            refused += 1
            continue
        assert torch.equal(read.images, whole.images)
    assert refused > 100


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 8, 8), None, "images: expected uint8"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), None, "C 1 or 3"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2), "labels: expected int64"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"int64 \[2\]"),
    ],
)
def test_zip_writer_refuses(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        write_edm_zip(tmp_path / "a.zip", images, labels)
    assert not list(tmp_path.iterdir())
