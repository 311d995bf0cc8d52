"""Any form becomes an EDM zip that reads back exactly, of the same bytes each time, an image at a time."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast.data import TRANSFORMS, load_dataset, repack
from ctm_fast.errors import ConfigError, DataError
from tests.command_line import tree
from tests.data.forms import (
    cifar_batches,
    encoded,
    picture,
    write_cifar,
    write_folder,
    write_mnist,
    write_npz,
    write_tar,
    write_zip,
)
from tests.memory import peak


def photographs(count: int) -> list[Image.Image]:
    """Of all sizes and shapes."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    images = [Image.fromarray(image) for image in (data.astronaut(), data.chelsea(), data.coffee())]
    generator = np.random.default_rng(0)
    return [images[i % 3].resize(tuple(generator.integers(20, 150, 2))) for i in range(count)]


def test_class_folders_of_photographs(tmp_path):
    """As ImageNet is stored; what is read back is each photograph cropped alone, in the order of names."""
    images = photographs(70)
    files = {f"n{i % 3:08d}/p{i:03d}.JPEG": encoded(image, "JPEG") for i, image in enumerate(images)}
    source = write_folder(tmp_path / "imagenet", files)
    written = repack(source, tmp_path / "a.zip", resolution=32, transform="center-crop-dhariwal")
    assert (written.count, written.num_classes) == (70, 3)
    read = load_dataset(tmp_path / "a.zip", resolution=32, channels=3, labels=True)
    for i, name in enumerate(sorted(files)):
        with Image.open(source / name) as image:
            expected = np.asarray(TRANSFORMS["center-crop-dhariwal"](image, name, 32))
        np.testing.assert_array_equal(read.images[i].permute(1, 2, 0).numpy(), expected)
        assert read.labels[i] == int(name[8])


def test_the_layout_is_edms(tmp_path):
    images = {f"{i:04d}.png": Image.new("L", (4, 4), i % 256) for i in range(1002)}
    labels = [[name, i % 5] for i, name in enumerate(images)]
    repack(write_zip(tmp_path / "a.zip", images, labels), tmp_path / "b.zip", resolution=4)
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        names = archive.namelist()
        assert names[:2] == ["00000/img00000000.png", "00000/img00000001.png"]
        assert names[1000:] == ["00001/img00001000.png", "00001/img00001001.png", "dataset.json"]
        assert json.loads(archive.read("dataset.json"))["labels"][7] == ["00000/img00000007.png", 2]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.testzip() is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_bytes_each_time_and_with_any_number_of_threads(tmp_path, threads):
    source = write_folder(tmp_path / "a", {f"{i:03d}.png": image for i, image in enumerate(photographs(100))})
    digests = set()
    for number in (1, 2, 7):
        threads(number)
        repack(source, tmp_path / "a.zip", resolution=16, transform="center-crop", labels=False)
        digests.add(hashlib.sha256((tmp_path / "a.zip").read_bytes()).hexdigest())
    assert len(digests) == 1


PIXELS = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(tmp_path, split):
    source = write_cifar(tmp_path / "a.tar.gz", cifar_batches(PIXELS, LABELS, "python"))
    repack(source, tmp_path / "a.zip", resolution=32, split=split)
    original = load_dataset(source, resolution=32, labels=True, split=split)
    read = load_dataset(tmp_path / "a.zip", resolution=32, labels=True)
    assert torch.equal(read.images, original.images)
    assert torch.equal(read.labels, original.labels)


@pytest.mark.parametrize(("resolution", "transform"), [(32, "none"), (32, "pad"), (16, "none"), (28, "none")])
def test_idx_as_training_reads_it(tmp_path, resolution, transform):
    write_mnist(tmp_path, PIXELS[:, :28, :28, 0], LABELS.astype(np.uint8))
    repack(tmp_path, tmp_path.parent / "idx.zip", resolution=resolution, transform=transform)
    original = load_dataset(tmp_path, resolution=resolution, labels=True)
    read = load_dataset(tmp_path.parent / "idx.zip", resolution=resolution, labels=True)
    assert torch.equal(read.images, original.images)
    assert torch.equal(read.labels, original.labels)


def test_webdataset_and_npz_and_digits(tmp_path):
    members = []
    for i, pixels in enumerate(PIXELS):
        members += [(f"{i}.png", encoded(picture(pixels))), (f"{i}.cls", b"%d" % LABELS[i])]
    sources = [write_tar(tmp_path / "a.tar", members), write_npz(tmp_path / "a.npz", PIXELS, LABELS)]
    for source in sources:
        repack(source, tmp_path / "a.zip", resolution=32)
        read = load_dataset(tmp_path / "a.zip", resolution=32, labels=True)
        np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS)
        assert read.labels.tolist() == LABELS.tolist()
    repack("digits", tmp_path / "a.zip", resolution=8)
    digits = load_dataset("digits", resolution=8, labels=True)
    assert torch.equal(load_dataset(tmp_path / "a.zip", resolution=8, labels=True).images, digits.images)


def test_the_first_few(tmp_path):
    source = write_npz(tmp_path / "a.npz", PIXELS, LABELS)
    for number, count in ((5, 5), (1000, 12)):
        written = repack(source, tmp_path / "a.zip", resolution=32, max_images=number)
        read = load_dataset(tmp_path / "a.zip", resolution=32, labels=True)
        np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS[:count])
        assert read.labels.tolist() == LABELS[:count].tolist()
        assert (written.count, written.num_classes) == (count, LABELS[:count].max() + 1)


def test_without_labels(tmp_path):
    source = write_folder(tmp_path / "a", {"0.png": picture(PIXELS[0])})
    with pytest.raises(DataError, match=r"^labels: .*in the folder of its class"):
        repack(source, tmp_path / "a.zip", resolution=32)
    assert repack(source, tmp_path / "a.zip", resolution=32, labels=False).num_classes == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_conversion(tmp_path):
    grey, alpha = Image.fromarray(PIXELS[0, ..., 0]), Image.fromarray(PIXELS[1]).convert("RGBA")
    source = write_folder(tmp_path / "a", {"0.png": grey, "1.png": alpha, "2.png": picture(PIXELS[2])})
    with pytest.raises(
        DataError, match=r"got mode RGBA in '1.png'; expected images of 32x32x1, got '2.png' \(32x32x3\)"
    ):
        repack(source, tmp_path / "a.zip", resolution=32, labels=False)
    repack(source, tmp_path / "a.zip", resolution=32, labels=False, conversion="rgb")
    read = load_dataset(tmp_path / "a.zip", resolution=32, labels=False).images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(read[0], PIXELS[0, ..., :1].repeat(3, 2))
    np.testing.assert_array_equal(read[1:], PIXELS[1:3])
    repack(source, tmp_path / "a.zip", resolution=32, labels=False, conversion="grey")
    assert load_dataset(tmp_path / "a.zip", resolution=32, labels=False).images.shape == (3, 1, 32, 32)


def broken(folder: Path, names: list[str]) -> Path:
    files: dict[str, Image.Image | bytes] = {f"{i:03d}.png": picture(PIXELS[0]) for i in range(100)}
    return write_folder(folder / "a", files | dict.fromkeys(names, b"hello"))


def test_unreadable_images_are_all_told_and_nothing_is_written(tmp_path):
    source = broken(tmp_path, ["007.png", "042.png", "050.png", "099.png"])
    (tmp_path / "a.zip").write_bytes(b"what was there")
    before = tree(tmp_path)
    with pytest.raises(DataError) as error:
        repack(source, tmp_path / "a.zip", resolution=32, labels=False)
    assert "cannot read '007.png': UnidentifiedImageError: " in str(error.value)
    assert str(error.value).endswith(" and 1 more (4 of 100 images)")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"resolution": 16},
            r"images of 16x16, got 'image 0' \(32x32x3\), .* and 9 more \(12 of 12 images\); a transform makes",
        ),
        ({"resolution": 16, "transform": "pad"}, r"expected images of at most 16x16, got 'image 0' \(32x32x3\)"),
        ({"resolution": 32, "split": "test"}, "^split: expected train"),
    ],
)
def test_refused(tmp_path, arguments, message):
    source = write_npz(tmp_path / "a.npz", PIXELS, LABELS)
    with pytest.raises(DataError, match=message):
        repack(source, tmp_path / "a.zip", **arguments)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS - 1, "expected 0 to 65535, got -1"),
        (LABELS / 2, r"integers \[12\], got float64"),
        (LABELS[:3], r"int64 \[3\]"),
    ],
)
def test_bad_labels_are_told_before_any_image_is_read(tmp_path, labels, message):
    source = write_npz(tmp_path / "a.npz", PIXELS, labels)
    with pytest.raises(DataError, match=f"^labels: .*{message}"):
        repack(source, tmp_path / "a.zip", resolution=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"transform": "crop"},
            "^transform: expected one of none, pad, center-crop, center-crop-dhariwal, got 'crop'$",
        ),
        ({"conversion": "RGB"}, "^conversion: expected one of rgb, grey, got 'RGB'$"),
        ({"max_images": 0}, "^max_images: expected at least 1, got 0$"),
        ({"resolution": 0}, "^resolution: expected 1 to 1024, got 0$"),
    ],
)
def test_arguments_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        repack("digits", tmp_path / "a.zip", **{"resolution": 8, **arguments})
    assert not list(tmp_path.iterdir())


def test_killed_on_the_way(tmp_path, monkeypatch):
    """Ctrl-C leaves nothing behind."""

    def interrupted(image: Image.Image, name: str, resolution: int) -> Image.Image:
        if name == "050.png":
            raise KeyboardInterrupt
        return image

    source = broken(tmp_path, [])
    monkeypatch.setitem(TRANSFORMS, "none", interrupted)
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        repack(source, tmp_path / "a.zip", resolution=32, labels=False)
    assert tree(tmp_path) == before


# Memory


def test_reading_takes_the_array_and_no_more(tmp_path):
    """2,000 images of 64x64x3 are 23 MiB; any copy of the array would be seen."""
    content = encoded(picture(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    source = write_folder(tmp_path / "a", {f"{i:04d}.png": content for i in range(2000)})
    code = f"load_dataset({str(source)!r}, resolution=64, labels=False)"
    before = "from ctm_fast.data import load_dataset\nfrom PIL import Image\nImage.init()"
    array = 2000 * 64 * 64 * 3 / 1024
    assert array < peak(code, cwd=tmp_path, before=before) < 1.25 * array


def test_repacking_takes_a_few_images(tmp_path):
    """100 images of 512x512x3 are 75 MiB."""
    content = encoded(
        picture(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)), compress_level=1
    )
    source = tmp_path / "a"
    source.mkdir()
    (tmp_path / "one.png").write_bytes(content)
    for i in range(100):
        (source / f"{i:04d}.png").symlink_to(tmp_path / "one.png")
    code = f"repack({str(source)!r}, 'a.zip', resolution=128, transform='center-crop', labels=False)"
    before = (
        "from ctm_fast.data import repack\nfrom PIL import Image\nimport torch\nImage.init(); torch.set_num_threads(1)"
    )
    assert peak(code, cwd=tmp_path, before=before) < 24 * 1024
