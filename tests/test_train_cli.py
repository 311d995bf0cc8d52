"""``python -m ctm_fast.train``: what is refused, and that nothing is written then."""

import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_fast import train
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.training import preset
from ctm_fast.training.config import to_dict
from tests.command_line import assert_refused, call, tree
from tests.disk import small_disk
from tests.snapshots import save_snapshot

HUGE = "9" * 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with files to trip over."""
    monkeypatch.chdir(tmp_path)
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez("wide.npz", arr_0=np.zeros((4, 9, 9, 1), np.uint8), arr_1=np.arange(4))
    np.savez("colour.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.arange(4))
    np.savez("bare.npz", arr_0=images)
    np.savez("classes.npz", arr_0=images, arr_1=np.array([0, 1, 2, 10]))
    np.savez("float.npz", arr_0=images.astype(np.float32), arr_1=np.arange(4))
    np.savez("none.npz", arr_0=images[:0], arr_1=np.arange(0))
    Path("cut.npz").write_bytes(Path("bare.npz").read_bytes()[:-30])
    Path("text.npz").write_text("images\n")
    Path("text.zip").write_text("images\n")
    with zipfile.ZipFile("notes.zip", "w") as archive:
        archive.writestr("readme.txt", "no image\n")
    Path("empty").mkdir()
    Path("idx").mkdir()
    with gzip.open("idx/train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x0803, 4, 8, 8) + bytes(100))
    Path("file").write_text("not a directory\n")
    save_snapshot(Path("student.safetensors"), CTM)
    save_snapshot(Path("small.safetensors"), EDMDenoiser)
    Path("cut.safetensors").write_bytes(Path("small.safetensors").read_bytes()[:-9])
    Path("empty.safetensors").write_bytes(b"")
    torch.save({"a": torch.zeros(2)}, "pickle.safetensors")
    return tmp_path


STAGE = "--stage ctm --teacher"

BAD = [
    # data
    ("--data nowhere", "data: ", "nowhere, which does not exist"),
    ("--data empty", "data: ", "expected digits", "got empty"),
    ("--data file", "data: ", "got file"),
    ("--data text.npz", "data: ", "cannot read text.npz"),
    ("--data cut.npz", "data: ", "cannot read cut.npz"),
    ("--data text.zip", "data: ", "cannot read text.zip"),
    ("--data notes.zip", "data: ", "readme.txt"),
    ("--data idx", "data: ", "expected 256 bytes"),
    ("--data wide.npz", "data: ", "expected images of 8x8, got 9x9"),
    ("--data colour.npz", "data: ", "expected 1 channels, got 3"),
    ("--data float.npz", "data: ", "expected uint8", "float32"),
    ("--data none.npz", "data: ", "at least one image"),
    ("--data bare.npz", "labels: ", "conditional"),
    ("--data classes.npz", "--data: ", "network.label_dim = 10", "got 10"),
    ("--set network.img_resolution=16", "data: ", "expected images of 16x16, got 8x8"),
    ("--data " + "x" * 300, ""),
    # presets, keys
    ("--preset digit", "preset: ", "'digit'", "did you mean digits?"),
    ("--preset cifar", "preset: ", "'cifar'", "did you mean cifar10-cond?"),
    ("--preset mine", "preset: ", "'mine'", "expected one of cifar10-cond, "),
    ("--set teacher.stepz=1", "--set teacher.stepz: ", "did you mean teacher.steps?"),
    ("--set techer.lr=1", "--set techer.lr: ", "did you mean teacher.lr?"),
    ("--set lr=1", "--set lr: ", "unknown key"),
    ("--set teacher.lr.x=1", "--set teacher.lr.x: ", "did you mean teacher.lr?"),
    ("--set teacher=1", "--set teacher: ", "such as teacher.steps"),
    ("--set teacher.steps", "--set: ", "expected key=value, got 'teacher.steps'"),
    ("--set =3", "--set : ", "unknown key"),
    # types
    ("--set teacher.steps=ten", "--set teacher.steps: ", "expected int, got 'ten'"),
    ("--set teacher.steps=1.5", "--set teacher.steps: ", "expected int, got '1.5'"),
    ("--set teacher.steps=", "--set teacher.steps: ", "expected int, got ''"),
    ("--set teacher.lr=fast", "--set teacher.lr: ", "expected float, got 'fast'"),
    ("--set ctm.lr_decay=2", "--set ctm.lr_decay: ", "expected bool, got '2'"),
    ("--set network.channel_mult=1,b", "--set network.channel_mult: ", "comma-separated integers, got '1,b'"),
    # ranges
    ("--set teacher.steps=0", "teacher.steps: ", "got 0"),
    ("--set ctm.steps=-3", "ctm.steps: ", "got -3"),
    (f"--set teacher.steps={HUGE}", "teacher.steps: ", HUGE),
    ("--set teacher.batch=0", "teacher.batch: ", "got 0"),
    (f"--set ctm.batch={HUGE}", "ctm.batch: ", HUGE),
    ("--set teacher.lr=nan", "teacher.lr: ", "a finite number, got nan"),
    ("--set teacher.lr=inf", "teacher.lr: ", "a finite number, got inf"),
    ("--set teacher.lr=-1e-3", "teacher.lr: ", "got -0.001"),
    ("--set teacher.ema=1", "teacher.ema: ", "0 <= ema < 1, got 1.0"),
    ("--set teacher.p_mean=nan", "teacher.p_mean: ", "got nan"),
    ("--set teacher.p_std=0", "teacher.p_std: ", "got 0.0"),
    ("--set sigma_data=0", "sigma_data: ", "got 0.0"),
    ("--set ctm.points=1", "ctm.points: ", "got 1"),
    ("--set ctm.k_power=-1e3", "ctm.k_power: ", "-64 to 64, got -1000.0"),
    ("--set gan.weighting_power=9", "gan.weighting_power: ", "-8 to 8, got 9.0"),
    ("--set ctm.max_solver_steps=8", "ctm.max_solver_steps: ", "ctm.points = 8, got 8"),
    ("--set ctm.distance=lpips", "distance: lpips: ", "vgg16-397923af.pth, got none"),
    ("--set ctm.distance=fid", "ctm.distance: ", "lpips or efflite0, got 'fid'"),
    ("--set ctm.huber_c=0", "ctm.huber_c: ", "got 0.0"),
    ("--set ctm.dsm_weight=-1", "ctm.dsm_weight: ", "got -1.0"),
    ("--set ctm.s_init=random", "ctm.s_init: ", "zero or published, got 'random'"),
    ("--set network.augment_dim=9", "network.augment_dim: ", "0: no run augments its images, got 9"),
    ("--set network.label_dropout=1", "network.label_dropout: ", "0 <= label_dropout < 1, got 1.0"),
    ("--set ctm.adaptive_layer=first", "ctm.adaptive_layer: ", "output or block, got 'first'"),
    ("--set ctm.uniform_to=1.1", "ctm.uniform_to: ", "got 1.1"),
    ("--set snapshot_every=0", "snapshot_every: ", "got 0"),
    ("--set log_every=0", "log_every: ", "got 0"),
    ("--set preview_kimg=-1", "preview_kimg: ", "got -1.0"),
    ("--set evaluate_kimg=nan", "evaluate_kimg: ", "a finite number, got nan"),
    ("--keep 0", "--keep: ", "a number from 1 on, got 0"),
    ("--keep all", "argument --keep: ", "'all'"),
    ("--set ctm.emas=0.9,0.9", "ctm.emas: ", "different averages"),
    ("--set ctm.emas=power:0.5", "ctm.emas: ", "0.5"),
    ("--set teacher.emas=slow", "teacher.emas: ", "a rate such as 0.999", "'slow'"),
    ("--preset digits-gan --set gan.features=vgg", "gan.features: ", "efflite0, deit, indomain", "vgg"),
    ("--preset digits-gan --set gan.features=", "gan.features: ", "efflite0, deit, indomain, got ()"),
    ("--preset digits-gan --set gan.features=deit", "gan.deit: ", "the file of DeiT's weights", "got none"),
    ("--set stages=ctm,teacher", "stages: ", "teacher,ctm"),
    ("--set preset=fashion-mnist-16", "--set preset: ", "got one that --preset chooses"),
    ("--set teacher_sha256=x", "--set teacher_sha256: ", "got one that the run fills in"),
    # levels out of order
    ("--set levels.sigma_min=90", "levels.sigma_min, sigma_max: ", "0 < sigma_min < sigma_max, finite, got 90.0, 80.0"),
    ("--set levels.sigma_min=0", "levels.sigma_min, sigma_max: ", "got 0.0, 80.0"),
    ("--set levels.sigma_max=nan", "levels.sigma_min, sigma_max: ", "nan"),
    ("--set levels.sigma_max=inf", "levels.sigma_min, sigma_max: ", "got 0.002, inf"),
    ("--set levels.rho=0", "levels.rho: ", "got 0.0"),
    ("--set levels.rho=1e-9", "levels.rho: ", "got 1e-09"),
    # networks
    ("--set network.arch=vit", "network.arch: ", "ddpmpp", "'vit'"),
    ("--set network.label_dim=0", "network.label_dim: ", "data.conditional", "got 0"),
    ("--set data.conditional=false", "network.label_dim: ", "got 10"),
    ("--set network.img_channels=2", "network.img_channels: ", "1 or 3, got 2"),
    ("--set network.model_channels=0", "network.model_channels: ", "got 0"),
    (f"--set network.model_channels={HUGE}", "network.model_channels: ", HUGE),
    ("--set network.model_channels=33", "network: ", "33"),
    ("--set network.channel_mult=", "network.channel_mult: ", "got ()"),
    ("--set network.channel_mult=1,0", "network.channel_mult: ", "got (1, 0)"),
    ("--set network.channel_mult=1,1,1,1,1", "network: ", "expected a multiple of 16", "got 8"),
    ("--set network.num_blocks=0", "network.num_blocks: ", "got 0"),
    ("--set network.head_channels=7", "network: ", "head_channels"),
    ("--set network.head_channels=48", "network: ", "head_channels"),
    ("--set network.head_channels=128", "network: ", "head_channels"),
    ("--set network.dropout=1", "network.dropout: ", "got 1.0"),
    # seed, device, threads, unknown options
    ("--seed -1", "seed: ", "0 <= seed < 2^29, got -1"),
    (f"--seed {HUGE}", "seed: ", HUGE),
    ("--seed one", "argument --seed: ", "invalid int value: 'one'"),
    ("--threads 0", "--threads: ", "got 0"),
    ("--threads -2", "--threads: ", "got -2"),
    (f"--threads {HUGE}", "--threads: ", HUGE),
    ("--device tpu", "--device: ", "'tpu'"),
    ("--dry-run --device tpu", "--device: ", "'tpu'"),
    ("--device meta", "--device: ", "expected cpu or cuda, got 'meta'"),
    ("--device cuda:99", "--device: ", "'cuda:99'"),
    ("--stage student", "stages: ", "'student'"),
    ("--stage teacher,gan", "stages: ", "'gan'"),
    ("--stage gan", "--teacher: ", "got none"),
    ("--see 3", "unrecognized arguments: --see"),
    ("digits", "unrecognized arguments: digits"),
    # teachers
    ("--stage ctm", "--teacher: ", "got none"),
    ("--teacher small.safetensors", "--teacher: ", "only without the stage teacher"),
    ("--stage teacher --teacher small.safetensors", "--teacher: ", "only without the stage teacher"),
    ("--student small.safetensors", "--student: ", "only without the stage teacher"),
    ("--stage gan --teacher small.safetensors", "--student: ", "got none"),
    (f"{STAGE} small.safetensors --set ctm.solver=self", "--teacher: ", "none, as no stage of ctm follows a teacher"),
    (f"{STAGE} nowhere", "--teacher nowhere: ", "got no such file"),
    (f"{STAGE} empty", "--teacher empty: ", "got a directory"),
    (f"{STAGE} empty.safetensors", "--teacher empty.safetensors: ", "not a complete .safetensors file"),
    (f"{STAGE} cut.safetensors", "--teacher cut.safetensors: ", "not a complete .safetensors file"),
    (f"{STAGE} pickle.safetensors", "--teacher pickle.safetensors: ", "got a pickle, which is never loaded"),
    (f"{STAGE} student.safetensors", "--teacher student.safetensors: ", "expected an EDM teacher, got a CTM"),
    (f"{STAGE} small.safetensors", "--teacher small.safetensors: ", "model_channels = 32 as configured, got 8"),
    # places
    ("--outdir file", "--outdir: ", "got file"),
    ("--outdir file/runs", "--outdir: ", "got file/runs"),
    ("--outdir /proc/runs", "--outdir: ", "got /proc/runs"),
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
    assert_refused(call(train.main, words.split(" "), monkeypatch, capsys), names, *parts)
    assert tree(folder) == before


@pytest.mark.parametrize("outdir", ["empty", "empty/runs"])
def test_refused_read_only_outdir(
    outdir: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its mode, or for root, who may write anywhere, by its file system."""
    with small_disk(folder / "empty", "4k", "ro") if os.geteuid() == 0 else nullcontext():
        if os.geteuid() != 0:
            (folder / "empty").chmod(0o555)
        assert_refused(call(train.main, ["--outdir", outdir], monkeypatch, capsys), "--outdir: ", f"got {outdir}")


def test_a_line_break_in_a_value_stays_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(call(train.main, ["--data", "a\nb"], monkeypatch, capsys), "data: ", "a b")


def test_dry_run_prints_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder)
    argv = ["--dry-run", "--seed", "3", "--set", "ctm.lr=2e-4", "--set", "network.channel_mult=1,2,2"]
    code, out, err = call(train.main, argv, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert tree(folder) == before
    expected = to_dict(preset("digits"))
    expected["seed"], expected["ctm"]["lr"], expected["network"]["channel_mult"] = 3, 2e-4, [1, 2, 2]
    assert json.loads(out) == expected


def test_no_traceback_from_a_shell(folder: Path) -> None:
    """Once for real: another process, its exit code and its one line."""
    command = [sys.executable, "-m", "ctm_fast.train", "--set", "teacher.lr=nan"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: teacher.lr: expected a finite number, got nan\n"


def test_lines_of_progress_without_a_terminal(folder: Path) -> None:
    """No bar and no control characters in a log file, but where it is, how fast, and how long still."""
    np.savez("tiny.npz", arr_0=np.zeros((8, 4, 4, 1), np.uint8))
    sets = ["data.conditional=false", "network.label_dim=0", "network.img_resolution=4", "network.channel_mult=1"]
    sets += ["network.model_channels=4", "teacher.steps=2", "ctm.steps=2", "teacher.batch=2", "ctm.batch=2"]
    words = ["--device", "cpu", "--threads", "1", "--data", "tiny.npz", *(f"--set={assignment}" for assignment in sets)]
    command = [sys.executable, "-m", "ctm_fast.train", *words]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert lines[0] == "runs/00000-digits: starting on cpu"
    assert lines[1].startswith("teacher 2/2: loss ")
    assert lines[1].endswith(" images/s, 00:00 left")
    assert lines[2].startswith("ctm 2/2: loss ")
    assert lines[-1] == "runs/00000-digits/report.md"
    assert "\r" not in process.stdout
    report = (folder / lines[-1]).read_text()
    for picture in ("samples.png", "loss-teacher.png", "loss-ctm.png"):
        assert f"]({picture})" in report
        assert (folder / "runs/00000-digits" / picture).read_bytes().startswith(b"\x89PNG")
