"""``python -m ctm_fast.likelihood``: what it prints and writes, what it refuses, and that nothing is written then."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_fast import likelihood
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.evaluation.measure_likelihood import Settings, measure_likelihood
from ctm_fast.files import file_sha256
from ctm_fast.models import CTM, EDMDenoiser, build_network, save_model
from ctm_fast.sample import load
from ctm_fast.training.config import to_dict
from tests.command_line import assert_refused, call, tree
from tests.snapshots import save_snapshot, small_config


def save_fresh(path: str, *, resolution: int = 8, sigma_min: float = 0.002, bias: float = 0.0) -> None:
    """An unconditional teacher before its training: its network's output is ``bias``."""
    config = replace(small_config(0), levels=Levels(sigma_min=sigma_min))
    network = replace(config.network, img_resolution=resolution)
    net = build_network(network, s_branch=False)
    torch.nn.init.constant_(net.out_conv.bias, bias)
    save_model(path, EDMDenoiser(net), network, {"config": to_dict(config)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with snapshots, data of few images, and files to trip over."""
    monkeypatch.chdir(tmp_path)
    save_snapshot(Path("ctm.safetensors"), CTM)
    save_snapshot(Path("teacher.safetensors"), EDMDenoiser)
    save_snapshot(Path("plain.safetensors"), CTM, classes=0)
    save_fresh("fresh.safetensors")
    save_fresh("large.safetensors", resolution=16)
    save_fresh("levels.safetensors", sigma_min=0.01)
    save_fresh("broken.safetensors", bias=float("nan"))
    Path("cut.safetensors").write_bytes(Path("ctm.safetensors").read_bytes()[:1000])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    np.savez("five.npz", arr_0=images, arr_1=np.arange(5))
    np.savez("bare.npz", arr_0=images)
    np.savez("wide.npz", arr_0=images, arr_1=np.array([0, 1, 2, 3, 12]))
    np.savez("large.npz", arr_0=rng.integers(0, 256, (5, 16, 16, 1), dtype=np.uint8), arr_1=np.arange(5))
    np.savez("colour.npz", arr_0=rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), arr_1=np.arange(5))
    np.savez("nan.npz", arr_0=np.full((5, 8, 8, 1), np.nan, dtype=np.float32), arr_1=np.arange(5))
    Path("made.npz").mkdir()
    return tmp_path


BAD = [
    ("--network nowhere", "--network nowhere: ", "got no such file"),
    ("--network cut.safetensors", "--network cut.safetensors: ", "not a complete .safetensors file"),
    ("--teacher nowhere", "--teacher nowhere: ", "got no such file"),
    ("--network plain.safetensors --teacher large.safetensors", "--teacher: ", "expected resolution 8", "got 16"),
    ("--network plain.safetensors --teacher levels.safetensors", "--teacher: ", "expected sigma_min 0.002", "got 0.01"),
    ("--teacher plain.safetensors", "--teacher: ", "expected classes 10 as of --network, got 0"),
    ("--network broken.safetensors", "denoise: ", "expected finite values along the ODE"),
    ("--data nowhere.npz", "data: ", "nowhere.npz, which does not exist"),
    ("--data nan.npz", "data: nan.npz: ", "expected uint8 [N, H, W, C], got float32"),
    ("--data large.npz", "data: large.npz: ", "expected images of 8x8, got 16x16"),
    ("--data colour.npz", "data: colour.npz: ", "expected 1 channels, got 3"),
    ("--data bare.npz", "labels: bare.npz: ", "expected the array arr_1"),
    ("--data wide.npz", "labels: wide.npz: ", "expected 0 to 9, the classes of --network, got 12"),
    ("--split test", "split: ", "five.npz"),
    ("--split some", "split: ", "some"),
    ("--count 6", "--count: ", "expected 1 to 5, the images of --data, got 6"),
    ("--count 0", "--count: ", "got 0"),
    ("--count few", "argument --count: ", "'few'"),
    ("--tolerance 0", "tolerance: ", "expected a number between 0 and 1, got 0.0"),
    ("--tolerance nan", "tolerance: ", "got nan"),
    ("--tolerance 2", "tolerance: ", "got 2.0"),
    ("--probes normal", "argument --probes: ", "'normal'"),
    ("--probe-count 0", "probe_count: ", "got 0"),
    ("--probes exact --probe-count 4", "--probe-count: ", "expected none with --probes exact, got 4"),
    ("--dequantisation some", "argument --dequantisation: ", "'some'"),
    ("--compat theirs", "argument --compat: ", "'theirs'"),
    ("--batch 0", "batch: ", "got 0"),
    ("--seed -1", "seed: ", "got -1"),
    ("--seed 2147483648", "seed: ", "got 2147483648"),
    ("--out bits.csv", "--out: ", "expected a .npz, got bits.csv"),
    ("--out nowhere/bits.npz", "--out: ", "got nowhere/bits.npz"),
    ("--out made.npz", "--out: ", "got a folder: made.npz"),
    ("--device tpu", "--device: ", "'tpu'"),
    ("--threads 0", "--threads: ", "got 0"),
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
    argv = ["--network", "ctm.safetensors", "--data", "five.npz", "--out", "bits.npz", *words.split(" ")]
    assert_refused(call(likelihood.main, argv, monkeypatch, capsys), names, *parts)
    assert tree(folder) == before


def run(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    argv = ["--network", "ctm.safetensors", "--data", "five.npz", "--tolerance", "0.05", *words.split(" ")]
    code, out, err = call(likelihood.main, argv, monkeypatch, capsys)
    assert (code, err) == (0, "")
    return out


def test_two_models_on_common_random_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds what ``measure_likelihood`` gives, the screen its means and the paired difference."""
    words = "--teacher teacher.safetensors --count 3 --probe-count 2 --seed 3 --batch 2 --out bits.npz --device cpu"
    out = run(words, monkeypatch, capsys)
    assert "five, split train, 3 of 5 images 1x8x8, with their labels, dequantisation uniform" in out
    with np.load("bits.npz") as arrays:
        found = dict(arrays)
    provenance = json.loads(str(found["provenance"]))
    assert provenance["network"]["sha256"] == hashlib.sha256(Path("ctm.safetensors").read_bytes()).hexdigest()
    assert provenance["teacher"]["sha256"] == hashlib.sha256(Path("teacher.safetensors").read_bytes()).hexdigest()
    assert [provenance[key] for key in ("seed", "tolerance", "probes", "probe_count", "dequantisation", "compat")] == [
        *(3, 0.05, "rademacher", 2, "uniform", None)
    ]
    with np.load("five.npz") as data:
        pixels, labels = torch.from_numpy(data["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(data["arr_1"])
    index = found["index"]
    assert len(set(index.tolist())) == 3
    assert found["labels"].tolist() == labels[index].tolist()
    settings = Settings(probe_count=2, tolerance=0.05, seed=3)
    means = []
    for name, prefix in (("ctm", ""), ("teacher", "teacher_")):
        sampler = load(f"{name}.safetensors", device="cpu")
        torch.set_float32_matmul_precision("highest")
        assert not sampler.model.training
        expected = measure_likelihood(
            sampler.model.denoise, pixels[index], labels[index], index, sampler.levels, settings, device=sampler.device
        )
        for key, values in vars(expected).items():
            np.testing.assert_allclose(found[prefix + key], values, rtol=1e-3, atol=1e-3)
        means.append(float(found[f"{prefix}bits_per_dim"].mean()))
    printed = [float(number) for number in re.findall(r"likelihood +(-?\d+\.\d+) ±", out)]
    assert printed == pytest.approx(means, abs=6e-5)
    difference = found["bits_per_dim"] - found["teacher_bits_per_dim"]
    error = difference.std(ddof=1) / 3**0.5
    assert f"network - teacher: {difference.mean():.4f} ± {error:.4f} bits/dim" in out


def test_a_network_in_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``sample`` takes it; the digest is the file's, found before the work and not after it."""
    Path("hub").mkdir()
    Path("ctm.safetensors").rename("hub/model.safetensors")
    run("--network hub --count 1 --out bits.npz --device cpu", monkeypatch, capsys)
    with np.load("bits.npz") as arrays:
        network = json.loads(str(arrays["provenance"]))["network"]
    assert network == {"file": "hub", "sha256": file_sha256("hub/model.safetensors")}


def test_a_model_beside_itself_differs_by_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("--teacher ctm.safetensors --count 2", monkeypatch, capsys)
    assert "network - teacher: 0.0000 ± 0.0000 bits/dim, on common random numbers" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--probes exact --count 1", ["unconditional", "exact trace", "dequantisation uniform"]),
        ("--probes gaussian", ["that of 1 gaussian probe included"]),
        ("--probe-count 3", ["over 3 rademacher probes alone"]),
        ("--dequantisation none", ["dequantisation none"]),
        ("--compat published", ["dequantisation none, formula published"]),
        ("--compat published-bug --dequantisation uniform", ["dequantisation uniform, formula published-bug"]),
    ],
)
def test_how_it_was_made_is_said(
    words: str, said: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(f"--network fresh.safetensors --count 2 {words}", monkeypatch, capsys)
    for part in said:
        assert part in out
    assert not Path("bits.npz").exists()


def test_one_image_has_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(r"likelihood +-?\d+\.\d{4} over images", run("--count 1", monkeypatch, capsys))
