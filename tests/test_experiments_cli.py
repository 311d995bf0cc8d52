"""``python -m ctm_fast.experiments``: each experiment at a tiny scale, going on from there, and what it refuses."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.experiments import EXPERIMENTS, ablations, capacity, figures, gamma, likelihood, one_step, robustness
from ctm_fast.experiments.__main__ import main
from ctm_fast.experiments.variants import CTM_PLAIN, Size
from ctm_fast.training import features
from tests.command_line import assert_refused, call, tree

TINY = ["--scale", "0.003", "--count", "20", "--set", "network.model_channels=8", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory; everything that takes long is cut short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "EXTRACTOR_STEPS", 5)
    monkeypatch.setattr(features, "train_classifier", partial(train_classifier, steps=5))
    for module in (one_step, gamma, ablations):
        monkeypatch.setattr(module, "NFES", (1, 2))
    monkeypatch.setattr(one_step, "TEACHER_NFE", 3)
    monkeypatch.setattr(ablations, "SCORE_NFE", 3)
    monkeypatch.setattr(capacity, "TEACHER_NFE", 3)
    monkeypatch.setattr(capacity, "SIZES", (Size(8, 1), Size(16, 1)))
    monkeypatch.setattr(robustness, "WORLD_NFES", (1, 2))
    monkeypatch.setattr(robustness, "MODEL_NFES", (1, 2))
    monkeypatch.setattr(likelihood, "SETTINGS", replace(likelihood.SETTINGS, tolerance=0.1, draws=2))
    np.savez("bare.npz", arr_0=np.zeros((30, 8, 8, 1), np.uint8))
    Path("file").write_text("not a directory\n")
    return tmp_path


def snapshots(folder: Path) -> dict[str, int]:
    """When each was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("snapshot-*.safetensors")}


def page(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The page of ``name`` after a run, which holds what it must."""
    code, out, err = call(main, [name, *TINY, *more], monkeypatch, capsys)
    assert code == 0, err
    written = Path("docs/results") / f"{name}-digits.md"
    assert out.endswith(f"{written}\n")
    text = written.read_text()
    assert EXPERIMENTS[name].title in text and "What shows, and what does not" in text
    for part in ("scikit-learn's handwritten digits", "Commit ", "torch ", "min of training", "CPU thread"):
        assert part in text
    assert f"python -m ctm_fast.experiments {name} --preset digits" in text
    assert str(Path.cwd()) not in text
    with Image.open(written.with_suffix(".png")) as picture:
        assert picture.size == (960, 540)
    record = json.loads(written.with_suffix(".json").read_text())
    assert record["made"]["data_sha256"] and record["finding"]["seeds"]
    return text


def test_gamma_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page("gamma", monkeypatch, capsys, "--seeds", "0,1")
    assert "seed 1000" in text and "2 paired seeds" in text and "neither is an FID" in text
    before = snapshots(folder)
    assert len(before) == 4  # teacher and student of each seed
    record = json.loads(Path("docs/results/gamma-digits.json").read_text())
    page("gamma", monkeypatch, capsys, "--seeds", "0,1")
    assert snapshots(folder) == before
    assert json.loads(Path("docs/results/gamma-digits.json").read_text())["finding"] == record["finding"]
    code, out, _ = call(main, ["gamma", *TINY, "--seeds", "0,1,2", "--dry-run"], monkeypatch, capsys)
    assert code == 0 and out.count("there") == 4 and f"{CTM_PLAIN.name}, seed 2" in out


@pytest.mark.long
@pytest.mark.parametrize("name", ["one-step", "likelihood", "ablations", "robustness", "capacity"])
def test_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(EXPERIMENTS, "capacity", replace(EXPERIMENTS["capacity"], sizes=capacity.SIZES))
    text = page(name, monkeypatch, capsys, "--seeds", "0,1")
    before = snapshots(folder)
    code, out, _ = call(main, [name, *TINY, "--seeds", "0,1", "--dry-run"], monkeypatch, capsys)
    assert code == 0 and out.count("there") == len(before)  # what is planned is what is trained
    assert snapshots(folder) == before
    assert name != "one-step" or ("The discriminator was right on" in text and "CM, 2" in text)


def test_dry_run_trains_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder)
    for name in EXPERIMENTS:
        code, out, err = call(main, [name, "--dry-run", "--threads", "1", "--device", "cpu"], monkeypatch, capsys)
        assert (code, err) == (0, "")
        assert "together" in out and "teacher" in out
    assert tree(folder) == before


BAD = [
    ("one-stop", "experiment: unknown 'one-stop'", "did you mean one-step?"),
    ("gamma --preset digit", "preset: unknown 'digit'", "did you mean digits?"),
    ("gamma --seeds 0,0", "--seeds: ", "expected different numbers"),
    ("gamma --seeds x", "--seeds: ", "got 'x'"),
    ("gamma --scale 0", "--scale: ", "got 0"),
    ("gamma --scale nan", "--scale: ", "got nan"),
    ("gamma --count 19", "--count: ", "expected at least 20, got 19"),
    ("gamma --results file", "--results: ", "got file"),
    ("gamma --results file/below", "--results: ", "got file/below"),
    ("gamma --set ctm.step=3", "--set ctm.step: ", "did you mean"),
    ("gamma --data nowhere", "data: ", "nowhere, which does not exist"),
    ("gamma --data bare.npz", "labels: ", "bare.npz"),
    ("gamma --threads 0", "--threads: ", "got 0"),
    ("", "the following arguments are required: NAME", ""),
]


@pytest.mark.parametrize(("argv", "names", "part"), BAD, ids=[argv for argv, _, _ in BAD])
def test_bad_input(
    argv: str, names: str, part: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder)
    assert_refused(call(main, [*argv.split(), "--device", "cpu"], monkeypatch, capsys), names, part)
    assert tree(folder) == before
