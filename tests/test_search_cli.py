"""``python -m ctm_fast.search``: what it compares, what it writes, and that ``ctm_fast.sample`` reads it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctm_fast import sample, search
from ctm_fast.diffusion.schedule import sampler_sigmas
from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.samplers import Found, Trial, gamma_sample, initial_noise
from ctm_fast.serving import search_report
from ctm_fast.serving.search_report import Validated, write_search
from tests.command_line import assert_refused, call, tree
from tests.snapshots import save_snapshot

WORDS = "--data digits --nfe 1,2 --gammas 0.5,1 --count 8 --points 4 --device cpu --threads 1"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_snapshot(tmp_path_factory.mktemp("network") / "ctm.safetensors", CTM)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory; the classifier that judges is trained for three steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ctm_fast.evaluation.data_distance.train_classifier", _hardly_trained)
    return tmp_path


def _hardly_trained(*args: Any, **options: Any) -> Any:
    return train_classifier(*args, **options, steps=3)


def run(network: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    code, said, err = call(
        search.main, ["--network", str(network), *WORDS.split(), *words.split()], monkeypatch, capsys
    )
    assert (code, err) == (0, "")
    return said


def test_candidates_share_starts_and_noise_and_validation_does_not(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen at the network itself: x at sigma_max, and the classes, of every schedule that is scored."""
    starts: list[tuple[bytes, bytes]] = []
    raw = CTM.raw

    def watched(self: CTM, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        if bool((t == 80.0).all()):
            starts.append((x.numpy().tobytes(), labels.numpy().tobytes()))
        return raw(self, x, t, s, labels)

    monkeypatch.setattr(CTM, "raw", watched)
    run(network, "", monkeypatch, capsys)
    # NFE 1: one schedule. NFE 2: the default, and each of three levels at three gammas. And twice two on fresh seeds.
    assert len(starts) == (1 + 2) + (3 * 3 + 2)
    searched, fresh = {*starts[:1], *starts[3:-2]}, {*starts[1:3], *starts[-2:]}
    assert len(searched) == 1
    assert len(fresh) == 1
    assert searched != fresh
    preset = json.loads(Path("search/search.json").read_text())
    assert preset["seeds"] == f"{2**40}-{2**40 + 7}"
    assert preset["validation_seeds"] == f"{2**40 + 8}-{2**40 + 15}"


def test_what_is_written(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(network, "", monkeypatch, capsys)
    assert said.endswith("search/search.json\n")
    written = tree(here)
    assert sorted(written) == ["search", *(f"search/{name}" for name in FILES)]
    preset = json.loads(Path("search/search.json").read_text())
    assert preset["network_sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert preset["metric"] == "Frechet distance of a small classifier's features"
    entry = preset["nfe"]["2"]
    assert [row["gamma"] for row in entry["gammas"]] == [0.0, 0.5, 1.0]
    assert all(row["score"] <= row["default"] for row in entry["gammas"])
    assert entry["search"]["best"]["score"] == min(row["score"] for row in entry["gammas"])
    kept = "best" if entry["validation"]["best"] < entry["validation"]["default"] else "default"
    assert (entry["sigmas"], entry["gamma"]) == (entry["search"][kept]["sigmas"], entry["search"][kept]["gamma"])
    table = Path("search/search.md").read_text()
    assert said.removesuffix("search/search.json\n").strip() in table
    assert table.count(f"{entry['validation']['best']:.4g}") >= 1
    for name in FILES[:2]:
        with Image.open(f"search/{name}") as image:
            assert image.size == (960, 540)
    refused = call(search.main, ["--network", str(network), *WORDS.split()], monkeypatch, capsys)
    assert_refused(refused, "--out: expected a folder without a search.json")
    assert tree(here) == written
    run(network, "--out again", monkeypatch, capsys)
    assert Path("again/search.json").read_bytes() == written["search/search.json"]  # another run finds the same


FILES = ["quality-gamma.png", "quality-nfe.png", "search.json", "search.md"]


def test_what_fitted_only_its_own_seeds_is_not_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default, best = Trial((80.0, 2.0, 0.002), 0.0, 5.0), Trial((80.0, 1.0, 0.002), 1.0, 4.0)
    found = [Found(default, default), Found(Trial(default.sigmas, 1.0, 6.0), best)]
    assert search_report.best_of(found) == best
    about = {"network_sha256": "", "metric": "distance", "count": 8, "data": "digits"}
    for fresh, kept in ((5.5, default), (4.5, best)):
        budget = Validated(found, default, Trial(best.sigmas, best.gamma, fresh))
        write_search(here, {2: budget}, about)
        entry = json.loads(Path("search.json").read_text())["nfe"]["2"]
        assert (tuple(entry["sigmas"]), entry["gamma"]) == (kept.sigmas, kept.gamma)
        assert entry["validation"] == {"default": 5.0, "best": fresh}


def write_preset(network: Path, **changes: Any) -> None:
    preset = {
        "format": "ctm_fast.preset.1",
        "network_sha256": hashlib.sha256(network.read_bytes()).hexdigest(),
        "nfe": {"2": {"sigmas": [80.0, 0.7, 0.002], "gamma": 0.6}},
    }
    Path("preset.json").write_text(json.dumps({**preset, **changes}))


SAMPLE = "--seeds 0-4 --steps 2 --preset preset.json --out a.npz --device cpu"


def test_sample_takes_levels_and_gamma_of_a_preset(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_preset(network)
    code, _, err = call(sample.main, ["--network", str(network), *SAMPLE.split()], monkeypatch, capsys)
    assert (code, err) == (0, "")
    sampler = sample.load(network, device="cpu")
    model = sampler.model
    assert isinstance(model, CTM)
    seeds, labels = torch.arange(5), torch.arange(5)
    with torch.no_grad():
        x = gamma_sample(
            lambda x, t, s: model.jump(x, t, s, labels),
            initial_noise(seeds, (1, 8, 8), sampler.levels),
            [80.0, 0.7, 0.002],
            gamma=0.6,
            jump_renoise=lambda x, t, s, after, i: model.jump_renoise(x, t, s, after, seeds, i, labels),
        )
    expected = (x.clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()
    with np.load("a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], expected)
        plain = sampler(range(5), steps=2, gamma=0.6, output="uint8")
        assert isinstance(plain, Tensor)
        assert not np.array_equal(arrays["arr_0"], plain.numpy())
    manifest = json.loads(Path("a.npz.json").read_text())
    assert (manifest["sigmas"], manifest["gamma"], manifest["steps"]) == ([80.0, 0.7, 0.002], 0.6, 2)


def test_a_preset_of_the_default_changes_nothing(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_preset(network, nfe={"3": {"sigmas": sampler_sigmas(3).tolist(), "gamma": 0.5}})
    for words in ("--preset preset.json --out a.npz", "--gamma 0.5 --out b.npz"):
        argv = ["--network", str(network), "--seeds", "0-4", "--steps", "3", "--device", "cpu", *words.split()]
        assert call(sample.main, argv, monkeypatch, capsys)[0] == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words", "parts"),
    [
        ({"network_sha256": "0" * 64}, "", ("of this network, got another network's",)),
        ({"format": "another"}, "", ("got another file",)),
        ({"nfe": []}, "", ("expected levels and gamma for each nfe",)),
        ({"nfe": {"2": {"sigmas": [80.0, 0.002], "gamma": 0}}}, "", ("expected 3 levels, got 2",)),
        ({"nfe": {"2": {"sigmas": [80.0, 90.0, 0.002], "gamma": 0}}}, "", ("strictly decreasing",)),
        ({"nfe": {"2": {"sigmas": [70.0, 1.0, 0.002], "gamma": 0}}}, "", ("expected levels from 80.0 to 0.002",)),
        ({"nfe": {"2": {"sigmas": [80.0, 1.0, 0.002], "gamma": 2}}}, "", ("0 <= gamma <= 1",)),
        ({"nfe": {"2": {"sigmas": [80.0, "x", 0.002], "gamma": 2}}}, "", ("could not convert",)),
        ({}, "--steps 4", ("expected --steps among 2, got 4",)),
        ({}, "--preset nowhere", ("got nowhere",)),
        ({}, "--preset .", ("got .",)),
    ],
)
def test_a_preset_is_refused(
    changes: dict[str, Any],
    words: str,
    parts: tuple[str, ...],
    network: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_preset(network, **changes)
    before = tree(here)
    argv = ["--network", str(network), *SAMPLE.split(), *words.split()]
    assert_refused(call(sample.main, argv, monkeypatch, capsys), "--preset: ", *parts)
    assert tree(here) == before


def test_a_preset_is_of_a_ctm_and_has_its_own_gamma(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_preset(network)
    argv = ["--network", str(network), *SAMPLE.split(), "--gamma", "0.5"]
    assert_refused(call(sample.main, argv, monkeypatch, capsys), "--gamma: expected none with --preset")
    teacher = save_snapshot(here / "teacher.safetensors", EDMDenoiser)
    argv = ["--network", str(teacher), *SAMPLE.split()]
    assert_refused(call(sample.main, argv, monkeypatch, capsys), "--preset: expected none for a teacher")
    assert not Path("a.npz").exists()


@pytest.mark.parametrize(
    ("words", "names", "parts"),
    [
        ("--nfe 0", "--nfe: ", ("got '0'",)),
        ("--nfe 1,1", "--nfe: ", ("different",)),
        ("--nfe 65", "--nfe: ", ("1..64",)),
        ("--nfe two", "--nfe: ", ("got 'two'",)),
        ("--gammas 0,2", "--gammas: ", ("got '0,2'",)),
        ("--gammas nan", "--gammas: ", ("got 'nan'",)),
        ("--gammas=", "--gammas: ", ("got ''",)),
        ("--count 1", "--count: ", ("2 to 1000000, got 1",)),
        ("--points 1", "--points: ", ("got 1",)),
        ("--batch 0", "--batch: ", ("got 0",)),
        ("--data nowhere", "data: ", ("got nowhere",)),
        ("--out nowhere/search", "--out: ", ("got nowhere/search",)),
        ("--out /proc/search", "--out: ", ("got /proc/search",)),
        ("--network nowhere", "--network nowhere: ", ("no such file",)),
        ("--network teacher.safetensors", "--network: expected a CTM", ("got a teacher",)),
        ("--threads 0", "--threads: ", ("got 0",)),
    ],
)
def test_refused(
    words: str,
    names: str,
    parts: tuple[str, ...],
    network: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_snapshot(here / "teacher.safetensors", EDMDenoiser)
    before = tree(here)
    argv = ["--network", str(network), *WORDS.split(), *words.split()]
    assert_refused(call(search.main, argv, monkeypatch, capsys), names, *parts)
    assert tree(here) == before
