"""``python -m ctm_fast.sample``: grids, folders, arrays; what is refused, and that nothing is written then."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ctm_fast import sample
from ctm_fast.models import CTM, EDMDenoiser
from tests.command_line import assert_refused, call, tree
from tests.snapshots import save_snapshot

HUGE = "9" * 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with snapshots and files to trip over."""
    monkeypatch.chdir(tmp_path)
    save_snapshot(Path("ctm.safetensors"), CTM)
    save_snapshot(Path("teacher.safetensors"), EDMDenoiser)
    save_snapshot(Path("plain.safetensors"), CTM, classes=0)
    content = Path("ctm.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[: len(content) // 2])
    Path("empty.safetensors").write_bytes(b"")
    Path("absurd.safetensors").write_bytes(b"\xff" * 7 + content[7:])
    torch.save({"a": torch.zeros(2)}, "pickle.pt")
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    Path("taken").write_text("a file\n")
    Path("made.png").mkdir()
    return tmp_path


BAD = [
    ("--network nowhere", "--network nowhere: ", "got no such file"),
    ("--network .", "--network .: ", "got a directory"),
    ("--network cut.safetensors", "--network cut.safetensors: ", "not a complete .safetensors file"),
    ("--network empty.safetensors", "--network empty.safetensors: ", "not a complete .safetensors file"),
    ("--network absurd.safetensors", "--network absurd.safetensors: ", "not a complete .safetensors file"),
    ("--network pickle.pt", "--network pickle.pt: ", "got a pickle, which is never loaded"),
    ("--network other.safetensors", "--network other.safetensors: ", "expected format ctm_fast.model.1, got None"),
    ("--network " + "x" * 300, "--network xxx", "not a complete"),
    ("--steps 0", "steps: ", "got 0"),
    ("--steps -1", "steps: ", "got -1"),
    (f"--steps {HUGE}", "steps: ", HUGE),
    ("--steps two", "argument --steps: ", "'two'"),
    ("--gamma -0.1", "gamma: ", "0 <= gamma <= 1, got -0.1"),
    ("--gamma 1.5", "gamma: ", "got 1.5"),
    ("--gamma nan", "gamma: ", "got nan"),
    ("--gamma much", "argument --gamma: ", "'much'"),
    ("--network teacher.safetensors --gamma 0.5", "gamma: ", "expected 0 for a teacher", "got 0.5"),
    ("--seeds x", "--seeds: ", "got 'x'"),
    ("--seeds=", "--seeds: ", "got ''"),
    ("--seeds 3-1", "--seeds: ", "got '3-1'"),
    ("--seeds 1,,2", "--seeds: ", "got '1,,2'"),
    ("--seeds -4", "--seeds: ", "got '-4'"),
    ("--seeds 1-2-3", "--seeds: ", "got '1-2-3'"),
    ("--seeds 0.5", "--seeds: ", "got '0.5'"),
    (f"--seeds {HUGE}", "--seeds: ", HUGE),
    ("--seeds " + "9" * 5000, "--seeds: "),
    ("--seeds 9223372036854775808", "--seeds: ", "got 9223372036854775808"),
    ("--seeds 0-99999999999", "--seeds: ", "at most 10000000"),
    ("--seeds 0-9999999,0", "--seeds: ", "at most 10000000"),
    ("--labels 10", "labels: ", "expected integers in 0..9, got 10"),
    ("--labels 0-10", "labels: ", "got 10"),
    ("--labels -1", "--labels: ", "got '-1'"),
    ("--labels cat", "--labels: ", "got 'cat'"),
    ("--network plain.safetensors --labels 0", "labels: ", "None for an unconditional model"),
    ("--out grid.jpeg", "--out: ", "a .png, a .npz or a folder, got grid.jpeg"),
    ("--out nowhere/grid.png", "--out: ", "got nowhere/grid.png"),
    ("--out nowhere/folder", "--out: ", "got nowhere/folder"),
    ("--out made.png", "--out: ", "expected a .png, got a folder"),
    ("--out taken", "--out: ", "expected a folder, got a file"),
    ("--out taken/grid.png", "--out: ", "got taken/grid.png"),
    ("--out /proc/grid.png", "--out: ", "got /proc/grid.png"),
    ("--device tpu", "--device: ", "'tpu'"),
    ("--device cuda:99", "--device: ", "'cuda:99'"),
    ("--threads 0", "--threads: ", "got 0"),
    ("--sigma-min 3", "unrecognized arguments: --sigma-min"),
]


@pytest.mark.parametrize(("words", "names", "parts"), [(case[0], case[1], case[2:]) for case in BAD])
def test_refused(
    words: str,
    names: str,
    parts: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(folder)
    argv = ["--network", "ctm.safetensors", "--seeds", "0-3", "--out", "grid.png", *words.split(" ")]
    assert_refused(call(sample.main, argv, monkeypatch, capsys), names, *parts)
    assert tree(folder) == before


def test_refused_without_what_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(sample.main, [], monkeypatch, capsys), "the following arguments are required: --network, --out")


def test_no_traceback_from_a_shell(folder: Path) -> None:
    """Once for real: another process, its exit code and its one line."""
    command = [sys.executable, "-m", "ctm_fast.sample", "--network", "pickle.pt", "--out", "grid.png"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: --network pickle.pt: ")
    assert process.stderr.count("\n") == 1


def _sample(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], network: str = "ctm.safetensors"
) -> None:
    code, _, err = call(sample.main, ["--network", network, *words.split(" ")], monkeypatch, capsys)
    assert (code, err) == (0, "")


def _expected(seeds: list[int], labels: list[int] | None = None, steps: int = 1, gamma: float = 0.0) -> np.ndarray:
    images = sample.load("ctm.safetensors", device="cpu")(seeds, steps, gamma, labels, "uint8")
    assert isinstance(images, torch.Tensor)
    return images.numpy()


def test_arrays(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _sample("--seeds 0-4,9 --labels 1,2 --steps 2 --gamma 0.5 --out a.npz --device cpu", monkeypatch, capsys)
    with np.load("a.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1", "seeds"]
        assert arrays["seeds"].tolist() == [0, 1, 2, 3, 4, 9]
        assert arrays["arr_1"].tolist() == [1, 2, 1, 2, 1, 2]  # in turn
        expected = _expected([0, 1, 2, 3, 4, 9], [1, 2, 1, 2, 1, 2], 2, 0.5)
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected)


def test_arrays_without_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _sample("--seeds 0-4 --out a.npz --device cpu", monkeypatch, capsys, network="plain.safetensors")
    with np.load("a.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "seeds"]
        assert arrays["arr_0"].shape == (5, 8, 8, 1)


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time everything is there
        _sample("--seeds 7,12 --out images --device cpu", monkeypatch, capsys)
    names = sorted(path.name for path in Path("images").iterdir())
    assert names == ["dataset.json", "seed000007.png", "seed000012.png"]
    for seed, expected in zip((7, 12), _expected([7, 12]), strict=True):
        with Image.open(f"images/seed{seed:06d}.png") as image:
            assert np.array_equal(np.asarray(image), expected[..., 0])


def test_grid(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _sample("--seeds 0-19 --out grid.png --device cpu", monkeypatch, capsys)
    expected = _expected(list(range(20)))
    with Image.open("grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 32 + 2, 10 * 32 + 9 * 2)  # four pixels square, two white between
    for i in range(20):
        top, left = 34 * (i // 10), 34 * (i % 10)
        assert np.array_equal(pixels[top : top + 32 : 4, left : left + 32 : 4], expected[i, ..., 0])


def test_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _sample("--seeds 0-3 --steps 5 --out a.npz", monkeypatch, capsys, network="teacher.safetensors")
    with np.load("a.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 8, 8, 1)
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("1,5,7", [1, 5, 7]), ("1,5-6", [1, 5, 6]), ("2,2", [2, 2]), ("007", [7])],
)
def test_ranges(text: str, numbers: list[int]) -> None:
    assert sample.parse_range("--seeds", text) == numbers
