"""``python -m ctm_fast.export``: what it prints and writes; what is refused, and that nothing is written then."""

from pathlib import Path

import pytest
import torch

from ctm_fast import export
from ctm_fast.errors import ConfigError
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.serving import export as exporting
from ctm_fast.serving import onnx_file
from tests.command_line import assert_refused, call, tree
from tests.snapshots import save_snapshot


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with snapshots and files to trip over."""
    monkeypatch.chdir(tmp_path)
    save_snapshot(Path("ctm.safetensors"), CTM)
    save_snapshot(Path("teacher.safetensors"), EDMDenoiser)
    Path("network.pt2").write_bytes(Path("ctm.safetensors").read_bytes())
    torch.save({"a": torch.zeros(2)}, "pickle.pt")
    Path("made.pt2").mkdir()
    return tmp_path


BAD = [
    ("nowhere --format pt2", "network nowhere: ", "got no such file"),
    (". --format pt2", "--out: ", "got .pt2"),
    (". --format pt2 --out a.pt2", "network .: ", "got a directory"),
    ("pickle.pt --format onnx", "network pickle.pt: ", "got a pickle, which is never loaded"),
    ("ctm.safetensors", "the following arguments are required: --format"),
    ("ctm.safetensors --format tflite", "argument --format: ", "'tflite'"),
    ("ctm.safetensors --format pt2 --batch 0-5", "batch: ", "1 <= LO <= HI", "got 0-5"),
    ("ctm.safetensors --format pt2 --batch 9-3", "batch: ", "got 9-3"),
    ("ctm.safetensors --format pt2 --batch 1-65537", "batch: ", "got 1-65537"),
    ("ctm.safetensors --format pt2 --batch many", "--batch: ", "got 'many'"),
    ("ctm.safetensors --format pt2 --batch 1-2-3", "--batch: ", "got '1-2-3'"),
    ("ctm.safetensors --format pt2 --batch=", "--batch: ", "got ''"),
    ("ctm.safetensors --format pt2 --batch " + "9" * 40, "--batch: ", "99999"),
    ("ctm.safetensors --format pt2 --steps 0", "steps: ", "got 0"),
    ("ctm.safetensors --format pt2 --steps 101", "steps: ", "got 101"),
    ("ctm.safetensors --format pt2 --steps two", "argument --steps: ", "'two'"),
    ("ctm.safetensors --format pt2 --gamma 1.5", "gamma: ", "got 1.5"),
    ("ctm.safetensors --format pt2 --gamma -0.1", "gamma: ", "got -0.1"),
    ("ctm.safetensors --format pt2 --gamma nan", "gamma: ", "got nan"),
    ("teacher.safetensors --format pt2 --gamma 0.5", "gamma: ", "expected 0 for a teacher"),
    ("ctm.safetensors --format onnx --start seeds", "start: ", "expected x_T for onnx"),
    ("ctm.safetensors --format pt2 --start x_t", "argument --start: ", "'x_t'"),
    ("ctm.safetensors --format pt2 --device tpu", "--device: ", "'tpu'"),
    ("ctm.safetensors --format pt2 --device cuda:99", "--device: ", "'cuda:99'"),
    ("ctm.safetensors --format pt2 --out a.onnx", "--out: ", "expected a .pt2, got a.onnx"),
    ("ctm.safetensors --format onnx --out a", "--out: ", "expected a .onnx, got a"),
    ("ctm.safetensors --format pt2 --out made.pt2", "--out: ", "expected a file, got a folder: made.pt2"),
    ("ctm.safetensors --format pt2 --out nowhere/a.pt2", "--out: ", "got nowhere/a.pt2"),
    ("ctm.safetensors --format pt2 --out pickle.pt/a.pt2", "--out: ", "got pickle.pt/a.pt2"),
    ("ctm.safetensors --format pt2 --out /proc/a.pt2", "--out: ", "got /proc/a.pt2"),
    ("network.pt2 --format pt2", "--out: ", "a file other than the network's, got network.pt2"),
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
    assert_refused(call(export.main, words.split(" "), monkeypatch, capsys), names, *parts)
    assert tree(folder) == before


def test_refused_without_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_file, "_MISSING", "No module named 'onnxruntime'")
    before = tree(folder)
    result = call(export.main, ["ctm.safetensors", "--format", "onnx"], monkeypatch, capsys)
    assert_refused(result, "format: ", "pip install ctm_fast[onnx]", "No module named 'onnxruntime'")
    assert tree(folder) == before
    Path("a.onnx").touch()
    with pytest.raises(ConfigError, match=r"a\.onnx: ONNX needs the extra onnx"):
        export.load_exported("a.onnx")


def test_refused_without_a_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    before = tree(folder)
    words = "ctm.safetensors --format pt2 --batch 1 --device cpu"
    assert_refused(call(export.main, words.split(" "), monkeypatch, capsys), "format: ", "needs a C++ compiler")
    assert tree(folder) == before


def test_says_what_it_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By default beside the network. Nothing is compiled here, so nothing is compared."""
    monkeypatch.setattr(exporting, "write_onnx", lambda exported, description, path: path.write_text("new"))
    monkeypatch.setattr(exporting, "compare", lambda program, path, batches: 2.5e-7)
    words = "ctm.safetensors --format onnx --batch 2-9 --steps 2 --gamma 0.5"
    code, out, err = call(export.main, words.split(" "), monkeypatch, capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "precond_input    its reference, plain PyTorch"
    assert "conv3x3          its reference, plain PyTorch" in lines
    assert lines[6:] == [
        "takes x_T, labels, noises for 2 to 9 images, on cpu",
        "images within 2e-07 of eager",
        "ctm.onnx",
    ]
    assert Path("ctm.onnx").read_text() == "new"


@pytest.mark.parametrize(("text", "batch"), [("8", (8, 8)), ("1-64", (1, 64)), ("003-4", (3, 4))])
def test_batches(text: str, batch: tuple[int, int]) -> None:
    assert export.parse_batch(text) == batch
