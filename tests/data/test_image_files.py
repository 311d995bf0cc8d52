"""Image files from zips, folders, webdataset's tars and parquet: the same images, labels and order; what is refused."""

import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast.data import load_dataset, misfits
from ctm_fast.data.decode_all import decode_all
from ctm_fast.data.images import ImageFile, ImageFiles
from ctm_fast.errors import DataError
from tests.data.forms import encoded, picture, write_folder, write_tar, write_zip

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 2, 1, 0]
PNGS = [encoded(picture(pixels)) for pixels in PIXELS]


def grey(size: int = 8, value: int = 0) -> Image.Image:
    return Image.new("L", (size, size), value)


def images_of(source: Path, **options: object) -> np.ndarray:
    return load_dataset(source, resolution=8, **{"labels": False, **options}).images.permute(0, 2, 3, 1).numpy()


# Folders


def test_folder_with_dataset_json_is_the_zip_unpacked(tmp_path):
    images = {f"0000{i % 2}/img{i:08d}.png": picture(pixels) for i, pixels in enumerate(PIXELS)}
    write_zip(tmp_path / "a.zip", images, [[name, label] for name, label in zip(images, LABELS, strict=True)])
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "a")
    packed, folder = (load_dataset(tmp_path / name, resolution=8, labels=True) for name in ("a.zip", "a"))
    assert torch.equal(folder.images, packed.images)
    assert folder.labels.tolist() == packed.labels.tolist() == [2, 1, 1, 0, 2, 0]


def test_class_folders(tmp_path):
    names = ["n02/b.JPEG", "n01/z.png", "n01/deeper/a.webp", "n10/c.jpg"]
    forms = ["JPEG", "PNG", "WEBP", "JPEG"]
    files = {name: encoded(grey(value=40 * i), form) for i, (name, form) in enumerate(zip(names, forms, strict=True))}
    files["n01/deeper/a.webp"] = encoded(grey(value=80), "PNG")  # whatever its name
    read = load_dataset(write_folder(tmp_path / "a", files), resolution=8, labels=True)
    assert read.images[:, 0, 0, 0].tolist() == [80, 40, 0, 120]
    assert read.labels.tolist() == [0, 0, 1, 2]
    assert (read.name, read.num_classes) == ("a", 3)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(["0", "10", "9"], [0, 2, 1]), (["a0", "a10", "a9"], [0, 1, 2]), (["1", "10", "x"], [0, 1, 2])],
)
def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path, classes, expected):
    write_folder(tmp_path, {f"{name}/0.png": grey() for name in classes})
    assert load_dataset(tmp_path, resolution=8, labels=True).labels.tolist() == expected


def test_folder_without_classes_is_for_unconditional_models(tmp_path):
    write_folder(tmp_path, {f"{i}.png": picture(pixels) for i, pixels in enumerate(PIXELS)})
    np.testing.assert_array_equal(images_of(tmp_path), PIXELS)
    with pytest.raises(
        DataError, match=r"expected dataset.json, or each image in the folder of its class, got '0.png'"
    ):
        load_dataset(tmp_path, resolution=8, labels=True)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", {"0.png": grey(value=7)})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cats").symlink_to(tmp_path / "elsewhere")
    assert images_of(tmp_path / "a", labels=True)[0, 0, 0, 0] == 7
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="got a link to one that it lies in: 'cats/again"):
        images_of(tmp_path / "a")


# Shards


def samples(indices: list[int]) -> list[tuple[str, bytes]]:
    members = []
    for i in indices:
        members += [(f"a.b/{i:04d}.cls", b"%d\n" % LABELS[i]), (f"a.b/{i:04d}.png", PNGS[i])]
        members += [(f"a.b/{i:04d}.json", b"{}")]
    return members


def test_webdataset(tmp_path):
    path = write_tar(tmp_path / "mine.tar", samples([3, 0, 4]))
    read = load_dataset(path, resolution=8, labels=True)
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS[[3, 0, 4]])
    assert read.labels.tolist() == [2, 2, 1]
    assert read.name == "mine"


def test_webdataset_of_its_own_writer(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the independent writer is the package's own")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, (content, label) in enumerate(zip(PNGS, LABELS, strict=True)):
            writer.write({"__key__": f"sample{i}", "png": content, "cls": label})
    read = load_dataset(tmp_path / "a.tar", resolution=8, labels=True)
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS)
    assert read.labels.tolist() == LABELS


def write_parquet(
    path: Path, rows: list[int], image: str = "image", label: str = "label", labels: object = None, **more: object
) -> Path:
    """``rows``: indices of PNGS; ``more``: further columns, or others in place of those."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")

    columns = {
        image: [{"bytes": PNGS[i], "path": f"{i}.png"} for i in rows],
        label: labels or [LABELS[i] for i in rows],
    }
    parquet.write_table(pyarrow.table({**columns, **more}), path, row_group_size=2)
    return path


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "mine.parquet", [5, 1, 2, 0, 3], image="img")
    read = load_dataset(path, resolution=8, labels=True)
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS[[5, 1, 2, 0, 3]])
    assert read.labels.tolist() == [0, 0, 1, 2, 2]
    assert load_dataset(path, resolution=8, labels=False).labels is None


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_shards_in_a_directory_and_their_splits(tmp_path, form):
    for name, indices in (("train-00001", [2, 3]), ("train-00000", [0, 1]), ("test-00000", [4, 5])):
        path = tmp_path / f"{name}.{form}"
        write_tar(path, samples(indices)) if form == "tar" else write_parquet(path, indices)
    train = load_dataset(tmp_path, resolution=8, labels=True)
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), PIXELS[:4])
    assert train.labels.tolist() == LABELS[:4]
    np.testing.assert_array_equal(images_of(tmp_path, split="test"), PIXELS[4:])
    for shard in tmp_path.glob("test-*"):
        shard.unlink()
    with pytest.raises(DataError, match=r"^split: expected train, as .* has no test split"):
        images_of(tmp_path, split="test")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [0])
    monkeypatch.delitem(sys.modules, "ctm_fast.data.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"^data: .*a.parquet: parquet files need pyarrow: pip install ctm_fast\[data\]"
    ):
        images_of(path)


# What is refused


def folder_of(**files: Image.Image | bytes) -> Callable[[Path], Path]:
    return lambda d: write_folder(
        d / "a", {name.replace("__", "/").replace("_", "."): file for name, file in files.items()}
    )


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes]) -> Callable[[Path], Path]:
    return lambda d: write_tar(d / "a.tar", members)


def damaged_tar(d: Path) -> Path:
    """The header of its second sample says nonsense; tarfile would stop there and say nothing."""
    path = write_tar(d / "a.tar", samples([0, 1]))
    content = bytearray(path.read_bytes())
    place = content.index(b"a.b/0001.cls")
    content[place] ^= 1
    path.write_bytes(content)
    return path


def linked(kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty directory": (
        lambda d: d,
        "or a directory with train-images-idx3-ubyte.gz, got .*, which holds no image$",
    ),
    "a directory of text": (folder_of(x_txt=b"x"), "which holds no image$"),
    "a text among images": (folder_of(c__x_txt=b"x", c__0_png=grey()), "expected files .png, .* got 'c/x.txt'$"),
    "many texts among images": (
        folder_of(c__0_png=grey(), **{f"c__{i}_txt": b"" for i in range(5)}),
        "got 'c/0.txt', 'c/1.txt', 'c/2.txt' and 2 more$",
    ),
    "a class without images": (
        lambda d: (write_folder(d, {"a/0.png": grey()}), (d / "b").mkdir(), d)[2],
        "^labels: .* expected images in the folder of each class, got none in 'b'$",
    ),
    "an image beside the classes": (
        folder_of(a__0_png=grey(), x_png=grey()),
        "in the folder of its class, got 'x.png'$",
    ),
    "classes of other sizes": (
        folder_of(a__0_png=grey(), b__0_png=grey(9), b__1_png=grey(7)),
        r"images of 8x8x1, got 'b/0.png' \(9x9x1\), 'b/1.png' \(7x7x1\) \(2 of 3 images\); `python -m ctm_fast",
    ),
    "no image of the size": (folder_of(a__0_png=grey(9)), r"expected images of 8x8, got 'a/0.png' \(9x9x1\) \(1 of 1"),
    "dataset.json without an image's label": (
        lambda d: write_folder(d, {"0.png": grey(), "dataset.json": b'{"labels": []}'}),
        "^labels: .*a label for each of 1 images, got none for 1: '0.png'$",
    ),
    "dataset.json that is none": (
        lambda d: write_folder(d, {"0.png": grey(), "dataset.json": b"{"}),
        "cannot read .*: dataset.json: JSONDecodeError",
    ),
    "a tar without labels": (tar_of(("a.png", PNGS[0])), "^labels: .*one KEY.cls for each image, .* for 'a'$"),
    "a tar with a label and no image": (
        tar_of(("a.png", PNGS[0]), ("b.cls", b"1")),
        "one image for each key, .* for 'b'$",
    ),
    "a tar with two images of one key": (tar_of(("a.png", PNGS[0]), ("a.jpg", b"")), "one image for each key, .* 'a'$"),
    "a tar with a float label": (
        tar_of(("a.png", PNGS[0]), ("a.cls", b"0.5")),
        "^labels: .*integers, got b'0.5' for 'a'$",
    ),
    "a tar with a negative label": (
        tar_of(("a.png", PNGS[0]), ("a.cls", b"-1")),
        "^labels: .*expected 0 to 65535, got -1",
    ),
    "a tar that leads out": (tar_of(("../a.png", PNGS[0])), "expected names inside the archive, got '../a.png'$"),
    "a tar from the root": (tar_of(("/a.png", PNGS[0])), "expected names inside the archive, got '/a.png'$"),
    "a tar with a symbolic link": (tar_of((linked(), b"")), "expected plain files, got 'a.png', a symbolic link$"),
    "a tar with a hard link": (tar_of((linked(tarfile.LNKTYPE), b"")), "got 'a.png', a hard link$"),
    "a tar that is empty": (tar_of(), "expected files KEY.png and KEY.cls, got none$"),
    "a tar of text": (lambda d: write_folder(d, {"a.tar": b"hello" * 300}) / "a.tar", "cannot read .*a.tar: ReadError"),
    "a tar that is compressed": (lambda d: write_tar(d / "a.tar", samples([0]), "w:gz"), "cannot read .*ReadError"),
    "a tar with a damaged header": (damaged_tar, "expected a header or the end at byte [0-9]+, got neither$"),
    "parquet without images": (
        lambda d: write_parquet(d / "a.parquet", [0], image="x", x=["text"]),
        r"expected one column of struct\{bytes, path\}, got columns 'x', 'label'$",
    ),
    "parquet of two images": (
        lambda d: write_parquet(d / "a.parquet", [0], other=[{"bytes": PNGS[0], "path": None}]),
        "got 'image', 'other'$",
    ),
    "parquet without labels": (
        lambda d: write_parquet(d / "a.parquet", [0], label="y"),
        "^labels: .*expected a column label, got 'image', 'y'$",
    ),
    "parquet of float labels": (
        lambda d: write_parquet(d / "a.parquet", [0], labels=[0.5]),
        "^labels: .*expected integers, got a column of double$",
    ),
    "parquet with a label missing": (
        lambda d: write_parquet(d / "a.parquet", [0, 1], labels=[None, 1]),
        "^labels: .*expected a label for each of 2 images, got 1 nulls$",
    ),
    "parquet with negative labels": (
        lambda d: write_parquet(d / "a.parquet", [0], labels=[-1]),
        "^labels: .*expected 0 to 65535, got -1",
    ),
    "parquet without the bytes": (
        lambda d: write_parquet(d / "a.parquet", [0, 1], image="i", i=[{"bytes": PNGS[0]}, {"bytes": None}]),
        r"cannot read 'row 1': ValueError: expected its bytes in the file, got null \(1 of 2 images\)$",
    ),
    "parquet of text": (
        lambda d: write_folder(d, {"a.parquet": b"hello" * 30}) / "a.parquet",
        "cannot read .*a.parquet",
    ),
    "shards of both kinds": (
        lambda d: write_folder(d, {"train-0.tar": b"", "train-0.parquet": b""}),
        "expected .tar or .parquet, got files of both kinds$",
    ),
    "shards of the test split alone": (
        lambda d: write_folder(d, {"test-0.tar": b""}),
        r"expected files train-\*.tar or train-\*.parquet, got only those of the test split$",
    ),
    "a zip with a name twice": (lambda d: zip_twice(d / "a.zip"), "expected each name once, got more of '0.png'$"),
}


def zip_twice(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", PNGS[0])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("0.png", PNGS[1])
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path, case):
    write, message = REFUSED[case]
    source = write(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(source, resolution=8, labels=True)
    assert "\n" not in str(error.value)


# Images that do not fit: all are counted before anything is trained on


def test_all_kinds_in_one_line(tmp_path):
    images: dict[str, Image.Image | bytes] = {f"{i:02d}.png": grey() for i in range(10)}
    images |= {f"{i:02d}.png": b"hello" for i in (3, 4)}
    images |= {f"{i:02d}.png": grey(9 + i) for i in (5, 6, 7, 8)}
    images["09.png"] = encoded(grey())[:-30]
    images["10.png"] = Image.new("CMYK", (8, 8)).convert("RGBA")
    with pytest.raises(DataError) as error:
        images_of(write_zip(tmp_path / "a.zip", images, None))
    told = str(error.value)
    assert told.startswith(f"data: {tmp_path}/a.zip: cannot read '03.png': UnidentifiedImageError: cannot identify")
    assert (
        "; expected images of 8x8x1, got '05.png' (14x14x1), '06.png' (15x15x1), '07.png' (16x16x1) and 1 more;" in told
    )
    assert "; expected 8-bit grey or RGB, got mode RGBA in '10.png' (8 of 11 images); `python" in told
    assert "\n" not in told


def test_after_a_thousand_the_rest_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(misfits, "MOST", 40)
    write_folder(tmp_path, {f"{i:04d}.png": grey(8 if i < 50 else 9) for i in range(300)})
    with pytest.raises(DataError, match=r"'0052.png' \(9x9x1\) and 37 more \(40 of the first 90 of 300 images\)"):
        images_of(tmp_path)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same(tmp_path, threads):
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (333, 8, 8, 3), dtype=np.uint8)
    images = {f"{i:04d}.png": picture(image) for i, image in enumerate(pixels)}
    path = write_zip(tmp_path / "a.zip", images, None)
    write_folder(tmp_path / "a", images)
    for number in (1, 3, 8):
        threads(number)
        np.testing.assert_array_equal(images_of(path), pixels)
        np.testing.assert_array_equal(images_of(tmp_path / "a"), pixels)
    wrong = {name: image if i % 7 else grey(9) for i, (name, image) in enumerate(images.items())}
    write_zip(path, wrong, None)
    told = set()
    for number in (1, 8):
        threads(number)
        with pytest.raises(DataError) as error:
            images_of(path)
        told.add(str(error.value))
    assert len(told) == 1
    assert "(48 of 333 images)" in told.pop()


@pytest.mark.parametrize("count", [2**50, 2**62])
def test_a_set_that_no_memory_holds(count):
    source = ImageFiles(Path("a.parquet"), count, [ImageFile("0", lambda: PNGS[0])], None)
    with pytest.raises(DataError, match=rf"expected to fit into memory, got {count} images of 8x8x3, [0-9]+ GiB"):
        decode_all(source, 8, None)


def test_threads_decode_side_by_side(tmp_path, threads, monkeypatch):
    """Two images wait for each other: on one thread they would wait for ever."""
    barrier = threading.Barrier(2, timeout=20)
    read = Path.read_bytes

    def both(path: Path) -> bytes:
        if path.name in ("0000.png", "0063.png"):  # of two blocks
            barrier.wait()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", both)
    write_folder(tmp_path, {f"{i:04d}.png": grey(value=i) for i in range(64)})
    threads(2)
    assert images_of(tmp_path)[:, 0, 0, 0].tolist() == list(range(64))


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_flipped_bytes_and_truncated_files(tmp_path, form):
    """No exception but DataError escapes; checksums of tar and PNG keep wrong pixels out, and parquet has none."""
    path = tmp_path / f"a.{form}"
    whole = write_tar(path, samples([0, 1, 2])) if form == "tar" else write_parquet(path, [0, 1, 2, 3])
    content, expected = whole.read_bytes(), images_of(whole)
    generator = np.random.default_rng(2)
    broken = [content[:length] for length in generator.integers(0, len(content), 30)]
    for place in generator.integers(0, len(content), 200):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        broken.append(bytes(flipped))
    refused = 0
    for wrong in broken:
        path.write_bytes(wrong)
        try:
            read = images_of(path, labels=True)
        except DataError:
            refused += 1
            continue
        assert form == "parquet" or np.array_equal(read, expected)
    assert refused > 60
