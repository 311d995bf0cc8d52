"""``python -m ctm_fast.dataset``: what it writes trains; each bad input is one line, and nothing is written then."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast import dataset
from ctm_fast.data import load_dataset
from tests.command_line import assert_refused, call, tree
from tests.data.forms import encoded, picture, write_folder, write_npz, write_tar

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 40, 52, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data sets of all qualities."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    write_folder(Path("photos"), {f"{'cat' if i % 2 else 'dog'}/{i}.png": picture(p) for i, p in enumerate(PIXELS)})
    write_folder(Path("flat"), {f"{i}.png": picture(p) for i, p in enumerate(PIXELS)})
    write_folder(Path("broken"), {f"{i}.png": b"hello" if i % 2 else picture(p) for i, p in enumerate(PIXELS)})
    write_folder(Path("mixed"), {"0.png": picture(PIXELS[0]), "1.png": Image.new("L", (40, 40))})
    write_folder(Path("texts"), {"a.txt": b"hello"})
    write_npz(Path("negative.npz"), PIXELS, np.arange(-1, 5))
    write_tar(Path("out.tar"), [("../a.png", encoded(picture(PIXELS[0]))), ("../a.cls", b"1")])
    Path("empty").mkdir()
    Path("made.zip").mkdir()
    Path("there.zip").write_bytes(b"there")
    return tmp_path


def test_what_it_writes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "photos a.zip --resolution 32 --transform center-crop-dhariwal"
    code, out, err = call(dataset.main, arguments.split(), monkeypatch, capsys)
    assert (code, out, err) == (0, "6 images of 32x32, labels of 2 classes\na.zip\n", "")
    read = load_dataset("a.zip", resolution=32, channels=3, labels=True)
    assert read.labels is not None
    assert read.labels.tolist() == [0, 0, 0, 1, 1, 1]
    code, out, err = call(dataset.main, [*arguments.split(), "--no-labels", "--max-images", "4"], monkeypatch, capsys)
    assert (code, out, err) == (0, "4 images of 32x32, no labels\na.zip\n", "")
    with zipfile.ZipFile("a.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert len(archive.namelist()) == 5


def test_conversion(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "mixed there.zip --resolution 16 --transform center-crop --convert rgb --no-labels"
    assert call(dataset.main, arguments.split(), monkeypatch, capsys)[0] == 0
    assert load_dataset("there.zip", resolution=16, labels=False).images.shape == (2, 3, 16, 16)


BAD = [
    ("nowhere a.zip", "data: ", "got nowhere, which does not exist"),
    ("empty a.zip", "data: ", "got empty, which holds no image"),
    ("texts a.zip", "data: ", "got texts, which holds no image"),
    ("flat a.zip", "labels: flat: ", "in the folder of its class, got '0.png', '1.png', '2.png' and 3 more"),
    ("flat a.zip --no-labels", "data: flat: ", "expected images of 32x32, got '0.png' (40x52x3)", "(6 of 6 images)"),
    ("broken a.zip --no-labels --transform center-crop", "data: broken: cannot read '1.png': ", "(3 of 6 images)"),
    ("mixed a.zip --no-labels --transform center-crop", "data: mixed: ", "got '1.png' (32x32x1) (1 of 2 images)"),
    ("photos a.zip --transform pad", "data: photos: ", "expected images of at most 32x32, got 'cat/1.png' (40x52x3)"),
    ("photos a.zip --split test", "split: expected train, as photos has no test split"),
    ("negative.npz a.zip --transform center-crop", "labels: negative.npz: ", "got -1"),
    ("out.tar a.zip", "data: out.tar: ", "expected names inside the archive, got '../a.png'"),
    ("photos a.npz", "DST: expected a .zip, got a.npz"),
    ("photos nowhere/a.zip", "DST: expected a place in a directory that can be written to, got nowhere/a.zip"),
    ("photos made.zip", "DST: expected a file, got a folder: made.zip"),
    ("there.zip there.zip", "DST: expected a file other than SRC, got there.zip"),
    ("photos photos/a.zip", "DST: expected a place outside of SRC, got photos/a.zip"),
    ("photos a.zip --resolution 0", "resolution: expected 1 to 1024, got 0"),
    ("photos a.zip --resolution 1025", "resolution: ", "got 1025"),
    ("photos a.zip --resolution big", "argument --resolution: ", "'big'"),
    ("photos a.zip --transform crop", "argument --transform: ", "'crop'"),
    ("photos a.zip --convert cmyk", "argument --convert: ", "'cmyk'"),
    ("photos a.zip --split val", "argument --split: ", "'val'"),
    ("photos a.zip --max-images 0", "max_images: expected at least 1, got 0"),
    ("photos a.zip --threads 0", "--threads: expected 1 to 1024, got 0"),
    ("photos", "the following arguments are required: DST"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0])
def test_bad_input(
    case: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder)
    arguments = case[0].split()
    if "--resolution" not in arguments:
        arguments += ["--resolution", "32"]
    assert_refused(call(dataset.main, arguments, monkeypatch, capsys), *case[1:])
    assert tree(folder) == before


def test_from_the_shell(tmp_path: Path) -> None:
    """And what it wrote is what training takes."""
    command = [sys.executable, "-m", "ctm_fast.dataset", "digits", str(tmp_path / "a.zip"), "--resolution", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (0, "")
    written = load_dataset(tmp_path / "a.zip", resolution=8, labels=True)
    digits = load_dataset("digits", resolution=8, labels=True)
    assert torch.equal(written.images, digits.images)
    assert (written.num_classes, digits.num_classes) == (10, 10)
