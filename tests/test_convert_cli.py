"""``python -m ctm_fast.convert``: published files to ours and back bit for bit; what it says, and what is refused."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctm_fast import convert
from ctm_fast.models import CTM, NETWORKS, EDMDenoiser, build_network, load_model, to_published
from ctm_fast.sample import load
from tests.command_line import assert_refused, call, tree
from tests.golden import Golden, assert_agree
from tests.memory import peak
from tests.models import malicious
from tests.models.published_files import save_edm, save_legacy, save_tar, save_zip
from tests.snapshots import save_snapshot

STUDENTS = [
    "cifar/net_ddpmpp_cond.npz",
    "cifar/net_ddpmpp_uncond.npz",
    "cifar/net_ncsnpp_uncond.npz",
    "imagenet/net_adm_cond.npz",
    "imagenet/net_adm_uncond.npz",
]
TEACHERS = ["edm/edm_adm_cond.npz", "edm/edm_ddpmpp_cond.npz", "edm/edm_ncsnpp_uncond.npz"]
Save = Callable[[Mapping[str, Tensor], Path], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _convert(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = call(convert.main, arguments.split(), monkeypatch, capsys)
    assert (code, err) == (0, "")
    return out


def _metadata(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _assert_back(golden: Golden, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``ours.safetensors`` gives the golden tensors back, and those give it."""
    _convert("ours.safetensors back.safetensors --to published", monkeypatch, capsys)
    _assert_same(load_file("back.safetensors"), golden.tensors("w"))
    assert _metadata("back.safetensors")["licence"] == load_model("ours.safetensors")[1]["licence"]
    _convert("back.safetensors again.safetensors", monkeypatch, capsys)
    ours, again = load_file("ours.safetensors"), load_file("again.safetensors")
    assert sorted(ours) == sorted(again)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert _metadata("again.safetensors")["network"] == _metadata("ours.safetensors")["network"]


@pytest.mark.parametrize("name", [name for name in STUDENTS if "cifar" in name])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_tar])
def test_student(
    save: Save, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Golden(name)
    save(golden.tensors("w"), Path("ema_0.999_049000.pt"))
    out = _convert("ema_0.999_049000.pt ours.safetensors", monkeypatch, capsys)
    assert "licence: not for commercial use; see the licence of Kim-Dongjun/ctm-cifar10" in out.splitlines()
    _assert_student(golden, out)
    _assert_back(golden, monkeypatch, capsys)


@pytest.mark.parametrize("name", [name for name in STUDENTS if "imagenet" in name])
def test_guided_student(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and shapes of guided-diffusion's files do not tell the resolution, nor the heads of a small network."""
    golden = Golden(name)
    save_file(golden.tensors("w"), "a.safetensors", metadata={"config": json.dumps(golden.meta), "licence": "any"})
    out = _convert("a.safetensors ours.safetensors", monkeypatch, capsys)
    assert "licence: any" in out.splitlines()
    _assert_student(golden, out)
    _assert_back(golden, monkeypatch, capsys)


def test_what_openai_publishes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its EDM denoiser and its consistency models cannot be told apart by their tensors: that is said."""
    golden = Golden("imagenet/train_step.npz")
    header = {"config": json.dumps(golden.meta), "licence": "a\n\x1b[2Jb"}
    save_file(golden.tensors("teacher"), "a.safetensors", metadata=header)
    out = _convert("a.safetensors ours.safetensors", monkeypatch, capsys)
    assert "adm denoiser" in out
    assert "licence: a  [2Jb" in out.splitlines()
    assert "note: taken for an EDM denoiser; a consistency model of openai's has the same tensors" in out
    out = _convert("ours.safetensors back.safetensors --to published", monkeypatch, capsys)
    assert "licence: a  [2Jb" in out.splitlines()
    _assert_same(load_file("back.safetensors"), golden.tensors("teacher"))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("cifar/samplers.npz", "w"), ("imagenet/samplers.npz", "w")]
    + [
        (f"{kind}/train_step.npz", prefix) for kind in ("cifar", "imagenet") for prefix in ("student", "ema", "teacher")
    ],
)
def test_round_trip(
    name: str, prefix: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Golden(name)
    save_file(golden.tensors(prefix), "a.safetensors", metadata={"config": json.dumps(golden.meta)})
    _convert("a.safetensors ours.safetensors", monkeypatch, capsys)
    _convert("ours.safetensors back.safetensors --to published", monkeypatch, capsys)
    _assert_same(load_file("back.safetensors"), golden.tensors(prefix))


def _assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def _assert_student(golden: Golden, out: str) -> None:
    """``ours.safetensors`` jumps as the published network, and ``out`` says what it is."""
    assert f"{golden.meta['arch']} CTM student" in out
    model, metadata = load_model("ours.safetensors")
    assert isinstance(model, CTM)
    assert metadata["preset"] is None
    with torch.no_grad():
        actual = model.jump(golden["x"], golden["t"], golden["s"], golden.get("y"))
    assert_agree(actual, golden["G"], 1e-4 if golden.meta["arch"] == "adm" else 1e-5)


def test_preset() -> None:
    for name, network in NETWORKS.items():
        assert convert.preset_of(replace(network, label_dim=7, dropout=0.5, augment_dim=9)) == name
        assert convert.preset_of(replace(network, num_blocks=2)) is None


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    golden = Golden(name)
    save_edm(golden.tensors("w"), Path("teacher.pkl"), golden.meta)
    out = _convert("teacher.pkl ours.safetensors", monkeypatch, capsys)
    assert out.splitlines()[0].startswith("teacher.pkl: ")
    assert "denoiser, " in out
    assert "16x16x3, " in out
    assert "licence: CC BY-NC-SA 4.0 (NVlabs/edm): not for commercial use" in out.splitlines()
    assert out.splitlines()[-1] == "ours.safetensors"
    model, metadata = load_model("ours.safetensors")
    assert isinstance(model, EDMDenoiser)
    assert model.net.config.dropout == golden.meta["network"]["dropout"]
    assert metadata["source"] == {
        "file": "teacher.pkl",
        "sha256": hashlib.sha256(Path("teacher.pkl").read_bytes()).hexdigest(),
        "publisher": "NVlabs/edm",
    }
    with torch.no_grad():
        assert_agree(model.denoise(golden["x"], golden["sigma"], golden.get("class_labels")), golden["D_x"])
    _assert_back(golden, monkeypatch, capsys)


def test_what_is_converted_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_zip(Golden(STUDENTS[0]).tensors("w"), Path("a.pt"))
    _convert("a.pt ours.safetensors", monkeypatch, capsys)
    images = load("ours.safetensors", device="cpu")(range(2))
    assert isinstance(images, Tensor)
    assert images.shape == (2, 3, 16, 16)
    assert bool(images.isfinite().all())


def test_run_directory(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = Golden(STUDENTS[0]).tensors("w")
    Path("run").mkdir()
    for name in ("ema_0.999_001000.pt", "ema_0.999_020000.pt", "ema_0.9999_030000.pt", "model040000.pt"):
        save_zip(tensors, Path("run") / name)
    out = _convert("run ours.safetensors --ema 0.999", monkeypatch, capsys)
    assert "steps 1000, 20000: the highest is taken" in out
    _, metadata = load_model("ours.safetensors")
    assert metadata["source"]["file"] == "ema_0.999_020000.pt"
    _convert("run other.safetensors --ema 0.9999", monkeypatch, capsys)
    assert load_model("other.safetensors")[1]["source"]["file"] == "ema_0.9999_030000.pt"


BAD = [
    ("a.pt out.pt", "DST: ", "expected a .safetensors, got out.pt"),
    ("a.pt nowhere/out.safetensors", "DST: ", "a directory that can be written to, got nowhere/out.safetensors"),
    ("ctm.safetensors /proc/out.safetensors --to published", "DST: ", "got /proc/out.safetensors"),
    ("a.pt made.safetensors", "DST: ", "expected a file, got a folder: made.safetensors"),
    ("ctm.safetensors ctm.safetensors", "DST: ", "other than SRC"),
    ("nothing out.safetensors", "nothing: ", "expected a file, got no such file"),
    ("a.pt out.safetensors --ema 0.999", "--ema: ", "expected a directory of ema_*.pt as SRC, got a.pt"),
    ("run out.safetensors", "--ema: ", "expected one of 0.999, 0.9999, got None for run"),
    ("run out.safetensors --ema 0.5", "--ema: ", "expected one of 0.999, 0.9999, got 0.5 for run"),
    (". out.safetensors --ema 0.999", "--ema: ", "expected a directory with files ema_<rate>_<step>.pt, got 0.999"),
    ("ctm.safetensors out.safetensors --to published --ema 0.999", "--ema: ", "expected none with --to published"),
    ("a.pt out.safetensors --to nowhere", "argument --to: ", "nowhere"),
    ("a.pt", "the following arguments are required: ", "DST"),
    ("ctm.safetensors out.safetensors", "ctm.safetensors: ", "is a model of ctm_fast already", "--to published"),
    ("a.pt out.safetensors --to published", "a.pt: ", "got a pickle, which is never loaded"),
    ("evil.pkl out.safetensors", "evil.pkl: ", "asks for os.system, which is not admitted; nothing ran"),
    ("edm2.pkl out.safetensors", "edm2.pkl: ", "holds a network of EDM2 (MPConv, Precond), which is not supported"),
    ("cut.pt out.safetensors", "cut.pt: ", "not a complete zip archive"),
    ("part.pt out.safetensors", "part.pt: ", "tensors: expected those of a network of architecture ddpmpp"),
]


@pytest.mark.parametrize(("arguments", "names", "parts"), [(case[0], case[1], case[2:]) for case in BAD])
def test_refused(
    arguments: str,
    names: str,
    parts: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and exit code 2, and nothing is written or run."""
    monkeypatch.setenv("CTM_FAST_CANARY", str(folder / "canary"))
    save_snapshot(Path("ctm.safetensors"), CTM)
    save_zip({"model.map_layer0_s.weight": torch.ones(2), "model.map_layer0.weight": torch.ones(2, 2)}, Path("part.pt"))
    save_zip({"model.map_layer0.weight": torch.ones(2)}, Path("a.pt"))
    Path("cut.pt").write_bytes(Path("a.pt").read_bytes()[:-30])
    Path("evil.pkl").write_bytes(malicious.CASES["os.system"].content())
    Path("edm2.pkl").write_bytes(malicious.CASES["EDM2"].content())
    Path("made.safetensors").mkdir()
    Path("run").mkdir()
    for name in ("ema_0.999_000100.pt", "ema_0.9999_000100.pt"):
        (Path("run") / name).write_bytes(Path("a.pt").read_bytes())
    before = tree(folder)
    assert_refused(call(convert.main, arguments.split(), monkeypatch, capsys), names, *parts)
    assert tree(folder) == before


CONVERT = """
from ctm_fast import convert
sys.argv[0] = "convert"
convert.main()
"""


@pytest.mark.parametrize("width", [64, pytest.param(192, marks=pytest.mark.long)])
def test_memory(width: int, folder: Path) -> None:
    """A conversion takes at most 1.3 times the file, in both directions; the width of the published network is 192."""
    with torch.device("meta"):
        net = build_network(replace(NETWORKS["imagenet64-adm"], model_channels=width), s_branch=True)
    save_zip({name: torch.rand(tensor.shape) for name, tensor in to_published(CTM(net)).items()}, Path("a.pt"))
    for arguments in ("a.pt ours.safetensors", "ours.safetensors back.safetensors --to published"):
        source = Path(arguments.split()[0])
        taken = peak(CONVERT, *arguments.split(), cwd=folder)
        assert taken * 1024 < 1.3 * source.stat().st_size, arguments
        source.unlink()
    Path("back.safetensors").unlink()  # gigabytes, which pytest would keep
