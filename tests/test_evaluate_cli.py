"""``python -m ctm_fast.evaluate``: what it compares, what it says of that, and what it refuses."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast import evaluate
from ctm_fast.data.sources import DIGITS
from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.models import CTM
from tests.command_line import assert_refused, call
from tests.models.features.test_inception import Script, random_weights
from tests.snapshots import save_snapshot

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, 120 real digits as a .npz and the next 100 as a folder of PNGs."""
    folder = tmp_path_factory.mktemp("files")
    save_snapshot(folder / "network.safetensors", CTM)
    with np.load(DIGITS) as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    np.savez(folder / "real.npz", arr_0=pixels[:120], arr_1=labels[:120])
    (folder / "images").mkdir()
    for i, image in enumerate(pixels[120:220]):
        Image.fromarray(image[..., 0]).save(folder / "images" / f"{i:04d}.png")
    np.savez(folder / "images.npz", arr_0=pixels[120:220], seeds=[*range(98), 200, 300])
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier of 20 steps: nothing here depends on how good it is."""
    monkeypatch.setattr(
        "ctm_fast.evaluation.extractors.train_classifier",
        lambda *args, **kwargs: train_classifier(*args, **{**kwargs, "steps": 20}),
    )


def run(argv: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> tuple[int, str, str]:
    return call(evaluate.main, [*map(str, argv), "--device", "cpu", "--threads", "1"], monkeypatch, capsys)


def test_a_folder_an_archive_and_a_network(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The folder and the archive hold the same images; nothing depends on the batch."""
    records = []
    for name, source in (
        ("folder", ["--samples", files / "images", "--batch", "7"]),
        ("archive", ["--samples", files / "images.npz"]),
        ("network", ["--network", files / "network.safetensors", "--seeds", "0-39,50-59"]),
    ):
        out = tmp_path / f"{name}.json"
        argv = [*source, "--reference", files / "real.npz", "--extractor", "indomain", "--out", out]
        code, text, err = run(argv, monkeypatch, capsys)
        assert code == 0, err
        record = json.loads(out.read_text())
        records.append(record)
        for said in (record["extractor"]["sha256"], record["reference"]["sha256"], "seed 0", "held_out_accuracy"):
            assert said in text
        assert "Frechet distance" in text and "FID" not in text and "KID " not in text
    folder, archive, network = records
    for metric in ("kid", "frechet"):
        assert folder["metrics"][metric]["value"] == pytest.approx(archive["metrics"][metric]["value"], rel=1e-4)
        assert folder["metrics"][metric]["value"] < network["metrics"][metric]["value"]
    assert folder["extractor"] == network["extractor"]
    assert archive["samples"]["seeds"] == "0-97,200,300"
    assert "seeds" not in folder["samples"]
    assert archive["samples"]["sha256"] == folder["samples"]["sha256"]
    assert folder["samples"]["count"] == 100
    assert folder["reference"]["count"] == 120
    assert folder["metrics"]["frechet"]["floor_count"] == 60
    assert network["samples"]["seeds"] == "0-39,50-59"
    assert network["samples"]["count"] == 50
    assert network["samples"]["rounding"] == "127.5 x + 127.5 to nearest, halves to even"
    assert (
        "samples: 100 images are too few for features of 256 dimensions: their covariance has rank "
        in folder["warnings"][0]
    )


def test_saved_moments_are_the_reference(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """They give the same distance; with another extractor they are refused, and by force it is said."""
    stats, out = tmp_path / "stats.npz", tmp_path / "out.json"
    samples = ["--samples", files / "images", "--metrics", "frechet", "--out", out]
    indomain = ["--extractor", f"indomain:{files / 'real.npz'}"]
    argv = [*samples, *indomain, "--reference", files / "real.npz", "--save-stats", stats]
    assert run(argv, monkeypatch, capsys)[0] == 0
    first = json.loads(out.read_text())
    code, text, err = run([*samples, *indomain, "--reference", stats], monkeypatch, capsys)
    assert code == 0, err
    second = json.loads(out.read_text())
    assert second["metrics"]["frechet"]["value"] == pytest.approx(first["metrics"]["frechet"]["value"], rel=1e-12)
    assert second["reference"]["moments"]["of"]["sha256"] == first["reference"]["sha256"]
    out.unlink()
    other = [*samples, "--extractor", f"indomain:{DIGITS}", "--reference", stats]
    assert_refused(
        run(other, monkeypatch, capsys), "reference: ", "the extractor is indomain:real there and indomain:dig"
    )
    assert not out.exists()
    code, text, err = run([*other, "--force"], monkeypatch, capsys)
    assert code == 0, err
    assert "forced " in text
    assert json.loads(out.read_text())["forced"] is True


def test_inception_alone_gives_an_fid(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Random weights in place of the published ones; EDM's form of reference, and ADM's, which has images besides.

    The distance itself, seconds at 2,048 dimensions, is not computed.
    """
    monkeypatch.setattr("ctm_fast.evaluation.measure.frechet_distance", lambda *moments: float(len(moments[0])))
    torch.save(random_weights(), tmp_path / "weights.pth")
    np.savez(tmp_path / "few.npz", arr_0=np.load(files / "images.npz")["arr_0"][:3])
    common = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "edm.npz", mu=common["mu"], sigma=common["sigma"])
    np.savez(tmp_path / "adm.npz", **common, arr_0=np.load(files / "real.npz")["arr_0"][:4])
    for reference, floor, spatial in (("edm", False, False), ("adm", True, True)):
        out = tmp_path / f"{reference}.json"
        argv = ["--samples", tmp_path / "few.npz", "--reference", tmp_path / f"{reference}.npz", "--out", out]
        argv += ["--extractor", "inception", "--weights", tmp_path / "weights.pth"]
        code, text, err = run([*argv, "--metrics", "frechet,spatial-frechet"], monkeypatch, capsys)
        assert code == 0, err
        assert "\nFID " in text and "TensorFlow 1 bilinear to 299" in text
        found = json.loads(out.read_text())["metrics"]
        assert (found["frechet"]["floor"] is not None) == floor
        assert found["frechet"]["value"] == 2048
        assert isinstance(found["spatial-frechet"], dict) == spatial


def test_torchscript_is_said_before_it_is_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    torch.jit.script(Script(2048)).save(str(tmp_path / "inception.pt"))
    argv = ["--samples", files / "images", "--reference", files / "real.npz", "--metrics", "kid"]
    argv += ["--extractor", "inception", "--weights", tmp_path / "inception.pt"]
    code, text, err = run(argv, monkeypatch, capsys)
    assert code == 0, err
    assert err.startswith(f"{tmp_path / 'inception.pt'} is TorchScript, which holds code: it is run\n")
    assert "form TorchScript, whose code was run" in text
    assert "\nKID " in text


@pytest.mark.parametrize(
    ("argv", "names", "parts"),
    [
        (["--samples", "images", "--split", "test"], "--reference", ["test"]),
        (["--samples", "torn"], "--samples", ["torn.png"]),
        ([], "--samples", ["expected either --samples or --network"]),
        (["--samples", "images", "--network", "network.safetensors"], "--samples", ["either"]),
        (["--samples", "none"], "--samples", ["got none, which does not exist"]),
        (["--samples", "empty"], "--samples", ["empty, which holds no image"]),
        (["--samples", "floats.npz"], "--samples", ["expected uint8 [N, H, W, C], got float32 [30, 8, 8, 1]"]),
        (["--samples", "wide.npz"], "--samples", ["expected images of 8x8, got 8x16"]),
        (["--samples", "large.npz"], "--reference", ["expected images of 16x16, got 8x8"]),
        (["--samples", "colour.npz"], "--reference", ["expected 3 channels, got 1"]),
        (["--samples", "broken.npz"], "--samples", ["cannot read broken.npz"]),
        (["--samples", "mixed"], "--samples", ["8x8", "9x9"]),
        (["--samples", "one.npz"], "images", ["expected at least 2, got 1"]),
        (["--network", "none.safetensors"], "none.safetensors", []),
        (["--network", "nan.safetensors", "--seeds", "5-9"], "--network", ["the image of seed 5 is not finite"]),
        (["--samples", "images", "--extractor", "fid"], "--extractor", ["expected one of efflite0, inception"]),
        (["--samples", "images", "--extractor", "inception"], "--weights", ["expected the file of inception"]),
        (["--samples", "images", "--extractor", "inception", "--weights", "one.npz"], "one.npz", []),
        (["--samples", "images", "--extractor", "indomain", "--weights", "x"], "--weights", ["expected none"]),
        (["--samples", "images", "--metrics", "fid"], "metrics", ["expected some of kid"]),
        (["--samples", "images", "--out", "none/out.json"], "--out", ["expected a file in a directory"]),
        (["--samples", "images", "--save-stats", "stats.txt"], "--save-stats", ["ends in .npz"]),
        (["--samples", "images", "--batch", "0"], "--batch", ["positive"]),
    ],
)
def test_refused(
    argv: list[str],
    names: str,
    parts: list[str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "real.npz", "network.safetensors"):
        Path(name).symlink_to(files / name)
    Path("empty").mkdir()
    Path("mixed").mkdir()
    for size in (8, 9):
        Image.new("L", (size, size)).save(Path("mixed") / f"{size}.png")
    Path("torn").mkdir()
    Path("torn/torn.png").write_bytes(b"PNG")
    np.savez("floats.npz", arr_0=np.zeros((30, 8, 8, 1), np.float32))
    np.savez("wide.npz", arr_0=np.zeros((30, 8, 16, 1), np.uint8))
    np.savez("large.npz", arr_0=np.zeros((30, 16, 16, 1), np.uint8))
    np.savez("colour.npz", arr_0=np.zeros((30, 8, 8, 3), np.uint8))
    np.savez("one.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    Path("broken.npz").write_bytes(b"PK")
    if "nan.safetensors" in argv:
        save_snapshot(Path("nan.safetensors"), CTM)
        sampler = evaluate.load("nan.safetensors", device="cpu")
        with torch.no_grad():
            sampler.model.net.out_conv.weight.fill_(torch.nan)
        monkeypatch.setattr(evaluate, "load", lambda *args, **kwargs: sampler)
    extractor = [] if "--extractor" in argv else ["--extractor", "indomain"]
    result = run([*argv, *extractor, "--reference", "real.npz"], monkeypatch, capsys)
    assert_refused(result, names, *parts)
    assert not list(tmp_path.glob("*.json"))


def test_moments_need_images_for_some_of_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    argv = ["--samples", files / "images", "--reference", tmp_path / "edm.npz"]
    save = ["--save-stats", tmp_path / "stats.npz"]
    assert_refused(run([*argv, *save], monkeypatch, capsys), "--save-stats", "expected a --reference with images")
    indomain = ["--extractor", "indomain"]
    assert_refused(run([*argv, *indomain], monkeypatch, capsys), "--extractor", "expected indomain:DATA")


@pytest.mark.long
def test_two_ranks_are_one(files: Path, tmp_path: Path) -> None:
    """Under torchrun, a classifier and all metrics."""
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
    common = ["-m", "ctm_fast.evaluate", "--samples", str(files / "images"), "--reference", str(files / "real.npz")]
    common += ["--extractor", "indomain", "--device", "cpu", "--threads", "1", "--batch", "16"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    records = []
    for name, command in (("one", [sys.executable]), ("two", torchrun)):
        out = tmp_path / f"{name}.json"
        process = subprocess.run([*command, *common, "--out", str(out)], capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        records.append(json.loads(out.read_text()))
    one, two = records
    assert one["extractor"] == two["extractor"]
    for metric in ("frechet", "kid"):
        assert one["metrics"][metric]["value"] == pytest.approx(two["metrics"][metric]["value"], rel=1e-9)
    assert one["metrics"]["neighbours"] == two["metrics"]["neighbours"]
