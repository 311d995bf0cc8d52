"""Exported programs: the images of a Sampler, out of an AOTInductor package, in Python and C++, and out of ONNX."""

import io
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctm_fast import _libraries
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.export import load_exported
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.ops import Stream, philox_normal, use_reference
from ctm_fast.ops._library import unavailable
from ctm_fast.samplers import initial_noise
from ctm_fast.serving import Sampler, load, onnx_file
from ctm_fast.serving import export as exporting
from ctm_fast.serving.exported import Exported
from ctm_fast.serving.program import Description, Program, Start, carried_ops, describe_program, trace
from tests.models.small import SMALL, random_network
from tests.snapshots import save_snapshot

ROOT = Path(__file__).parent.parent.parent
BATCHES = (1, 3, 64)
CLOSE = 1e-4


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("snapshots")
    return {
        "ctm": save_snapshot(folder / "ctm.safetensors", CTM),
        "unconditional": save_snapshot(folder / "unconditional.safetensors", CTM, classes=0),
        "teacher": save_snapshot(folder / "teacher.safetensors", EDMDenoiser),
    }


def images(sampler: Sampler, seeds: Tensor, about: Description) -> Tensor:
    """What the Sampler makes of the seeds, eagerly, with the default classes."""
    x = sampler(seeds.tolist(), steps=about.steps, gamma=about.gamma)
    assert isinstance(x, Tensor)
    assert x.std() > 0.1
    return x


def inputs(seeds: Tensor, about: Description) -> dict[str, Tensor]:
    """The inputs of a program that stand for these seeds: its own noise, drawn outside."""
    levels = Levels(about.sigma_min, about.sigma_max, about.rho)
    shape = (about.channels, about.resolution, about.resolution)
    made: dict[str, Callable[[], Tensor]] = {
        "seeds": lambda: seeds,
        "x_T": lambda: initial_noise(seeds, shape, levels),
        "labels": lambda: seeds % about.num_classes,
        "noises": lambda: torch.stack(
            [philox_normal(seeds, i, shape, stream=Stream.RENOISE) for i in range(about.noises)], dim=1
        ),
    }
    return {name: made[name]() for name in about.inputs}


def assert_samples(run: Callable[..., Tensor], about: Description, sampler: Sampler) -> None:
    """``run`` makes the Sampler's images, at every batch size, of seeds that no check of the export has used."""
    for batch in BATCHES:
        seeds = 1000 * batch + torch.arange(batch)
        found = run(**inputs(seeds, about))
        assert (found.dtype, found.shape) == (torch.float32, (batch, about.channels, *(about.resolution,) * 2))
        assert (found - images(sampler, seeds, about)).abs().max() <= CLOSE, batch


@pytest.mark.parametrize(
    ("start", "steps", "inputs"), [("seeds", 2, ["seeds", "labels"]), ("x_T", 3, ["x_T", "labels", "noises"])]
)
def test_a_trace_for_every_batch(snapshots: dict[str, Path], start: Start, steps: int, inputs: list[str]) -> None:
    sampler = load(snapshots["ctm"], device="cpu")
    program = Program(sampler.model, sampler.levels, start=start, steps=steps, gamma=0.5)
    exported = trace(program, (1, 64))
    about = describe_program(program, (1, 64), carried_ops(program, exported), "")
    assert about.inputs == inputs
    module = exported.module()
    assert_samples(lambda **given: module(*given.values()), about, sampler)


@pytest.mark.parametrize("batch", [(1, 1), (1, 2), (2, 2), (5, 6)])
def test_a_trace_for_few_batches(snapshots: dict[str, Path], batch: tuple[int, int]) -> None:
    sampler = load(snapshots["unconditional"], device="cpu")
    program = Program(sampler.model, sampler.levels, start="x_T", steps=1, gamma=0)
    module = trace(program, batch).module()
    for size in batch:
        x_T = program.example(size)
        assert (module(*x_T) - program(*x_T)).abs().max() <= CLOSE


def test_carried_ops_are_those_of_the_graph(snapshots: dict[str, Path]) -> None:
    """And no op is in the graph that is not told."""
    sampler = load(snapshots["ctm"], device="cpu")
    program = Program(sampler.model, sampler.levels, start="seeds", steps=2, gamma=0.5)
    exported = trace(program, (2, 2))
    found = carried_ops(program, exported)
    cpp = {"philox_normal", "precond_input", "group_norm_silu", "gamma_step"}
    expected = dict.fromkeys(program.ops, "reference") | {"attention": "sdpa"}
    if unavailable("cpp", "cpu") is None:
        expected |= dict.fromkeys(cpp, "cpp")
    assert found == expected
    calls = {str(node.target).split(".")[1] for node in exported.graph.nodes if str(node.target).startswith("ctm_fast")}
    assert calls == {op for op, backend in found.items() if backend == "cpp"}
    with use_reference():
        plain = trace(program, (2, 2))
    assert carried_ops(program, plain) == dict.fromkeys(program.ops, "reference")
    assert "ctm_fast" not in str(plain.graph)


def test_ops_of_a_program(snapshots: dict[str, Path]) -> None:
    model, levels = load(snapshots["ctm"], device="cpu").model, Levels()
    assert "gamma_step" not in Program(model, levels, start="seeds", steps=1, gamma=0.5).ops  # nothing to re-noise
    assert "gamma_step" not in Program(model, levels, start="seeds", steps=3, gamma=0).ops
    from_images = Program(model, levels, start="x_T", steps=3, gamma=0.5)
    assert from_images.noises == 2
    assert not {"gamma_step", "philox_normal"} & set(from_images.ops)


def _assert_onnx(network: Path, out: Path, steps: int, gamma: float) -> Description:
    result = exporting.export(network, out, "onnx", steps=steps, gamma=gamma)
    program = load_exported(out)
    assert program.description == result.description
    assert set(program.description.ops.values()) == {"reference"}
    assert result.difference <= CLOSE
    assert_samples(program, program.description, load(network, device="cpu"))
    return result.description


def test_onnx(snapshots: dict[str, Path], tmp_path: Path) -> None:
    assert _assert_onnx(snapshots["unconditional"], tmp_path / "a.onnx", 1, 0).inputs == ["x_T"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "steps", "gamma", "inputs"),
    [
        ("ctm", 1, 0, ["x_T", "labels"]),
        ("ctm", 2, 0.5, ["x_T", "labels", "noises"]),
        ("unconditional", 2, 0, ["x_T"]),
        ("teacher", 2, 0, ["x_T", "labels"]),
    ],
)
def test_onnx_of_each_kind(
    snapshots: dict[str, Path], tmp_path: Path, kind: str, steps: int, gamma: float, inputs: list[str]
) -> None:
    assert _assert_onnx(snapshots[kind], tmp_path / "a.onnx", steps, gamma).inputs == inputs


@pytest.mark.long
@pytest.mark.parametrize("arch", SMALL)
def test_onnx_of_each_architecture(arch: str, tmp_path: Path) -> None:
    sampler = Sampler(CTM(random_network(SMALL[arch], s_branch=True)), Levels())
    program = Program(sampler.model, sampler.levels, start="x_T", steps=1, gamma=0)
    with use_reference():
        exported = trace(program, (1, 64))
        about = describe_program(program, (1, 64), carried_ops(program, exported), "")
        onnx_file.write_onnx(exported, about, tmp_path / "a.onnx")
    assert_samples(load_exported(tmp_path / "a.onnx"), about, sampler)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled ``examples/cpp``."""
    if reason := unavailable("cpp", "cpu"):
        pytest.skip(reason)
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on the path")
    build = tmp_path_factory.mktemp("sample")
    configure = ["cmake", "-S", str(ROOT / "examples" / "cpp"), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    configure += [f"-DCTM_FAST_OPS={_libraries.DIRECTORY / _libraries.FILES['cpu']}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    return build / "sample"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "steps", "gamma"), [("unconditional", 1, 0.0), ("ctm", 2, 0.5)])
def test_package_in_python_and_cpp(
    sample: Path, snapshots: dict[str, Path], tmp_path: Path, kind: str, steps: int, gamma: float
) -> None:
    package = tmp_path / "a.pt2"
    result = exporting.export(snapshots[kind], package, "pt2", steps=steps, gamma=gamma, device="cpu")
    sampler, program = load(snapshots[kind], device="cpu"), load_exported(package)
    assert program.description == result.description
    assert "cpp" in program.description.ops.values()
    assert_samples(program, program.description, sampler)
    for count in (1, 3, 64, 67):  # the last in two batches
        subprocess.run([str(sample), str(package), str(count), str(tmp_path / "raw")], check=True)
        found = torch.from_numpy(np.fromfile(tmp_path / "raw", np.float32)).view(count, 1, 8, 8)
        expected = images(sampler, torch.arange(count), program.description)
        assert (found - expected).abs().max() <= CLOSE
    _assert_grid(sample, package, tmp_path / "grid.pgm", sampler(range(7), steps=steps, gamma=gamma, output="uint8"))
    _assert_refused([str(sample), str(package), "0", str(tmp_path / "b.pgm")], "COUNT from 1 on")
    _assert_refused([str(sample), str(snapshots["ctm"]), "1", str(tmp_path / "b.pgm")], "zip")
    _assert_refused([str(sample), str(package), "1", str(tmp_path / "nowhere" / "b.pgm")], "cannot be written")
    assert not (tmp_path / "b.pgm").exists()


def _assert_grid(sample: Path, package: Path, grid: Path, expected: object) -> None:
    """Seven images in three columns, to the rounding of a level."""
    assert isinstance(expected, Tensor)
    subprocess.run([str(sample), str(package), str(len(expected)), str(grid)], check=True)
    with Image.open(grid) as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (24, 24)
    for i, image in enumerate(expected[..., 0].numpy().astype(int)):
        top, left = 8 * (i // 3), 8 * (i % 3)
        assert np.abs(pixels[top : top + 8, left : left + 8] - image).max() <= 1
    assert (pixels[16:, 8:] == 255).all()


def _assert_refused(command: list[str], part: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert part in process.stderr


@pytest.mark.long
def test_package_without_our_library(snapshots: dict[str, Path], tmp_path: Path) -> None:
    """One of plain PyTorch alone runs where ctm_fast is not, and starts with images if it is to."""
    with use_reference():
        exporting.export(snapshots["ctm"], tmp_path / "a.pt2", "pt2", batch=(1, 64), start="x_T", device="cpu")
    program = load_exported(tmp_path / "a.pt2")
    assert set(program.description.ops.values()) == {"reference"}
    assert_samples(program, program.description, load(snapshots["ctm"], device="cpu"))
    code = "import sys, torch; p = torch._inductor.aoti_load_package(sys.argv[1]); "
    code += "print(p(torch.zeros(5, 1, 8, 8), torch.arange(5)).shape)"
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt2")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "torch.Size([5, 1, 8, 8])\n"


def test_a_file_of_other_images_is_found_out(snapshots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = load(snapshots["unconditional"], device="cpu")
    program = Program(sampler.model, sampler.levels, start="x_T", steps=1, gamma=0)
    about = describe_program(program, (1, 4), {}, "")
    off = {1: 5e-5, 3: 2e-5}
    exported = Exported(about, lambda x_T: program(x_T) + off[len(x_T)])
    monkeypatch.setattr(exporting, "load_exported", lambda path: exported)
    assert 4e-5 < exporting.compare(program, Path("a.onnx"), [1, 3]) < 6e-5
    for off[3] in (2e-4, float("nan")):
        with pytest.raises(RuntimeError, match=r"images are off by .* at batch 3"):
            exporting.compare(program, Path("a.onnx"), [1, 3])


def test_nothing_is_written_that_is_not_the_model(
    snapshots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(program: Program, path: Path, batches: list[int]) -> float:
        assert path.read_text() == "new"
        raise RuntimeError("images are off")

    monkeypatch.setattr(exporting, "write_onnx", lambda exported, description, path: path.write_text("new"))
    monkeypatch.setattr(exporting, "compare", differs)
    (tmp_path / "a.onnx").write_text("former")
    with pytest.raises(RuntimeError, match="images are off"):
        exporting.export(snapshots["unconditional"], tmp_path / "a.onnx", "onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "former")]


ABOUT = Description(
    kind="ctm",
    start="x_T",
    steps=3,
    gamma=0.5,
    num_classes=10,
    noises=2,
    channels=1,
    resolution=8,
    batch_min=2,
    batch_max=4,
    sigma_data=0.5,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    device="cpu",
    ops={"attention": "sdpa"},
    source_sha256="00",
)


def test_description_survives_its_strings() -> None:
    assert Description.of(ABOUT.metadata()) == ABOUT
    assert all(isinstance(text, str) for text in ABOUT.metadata().values())


@pytest.mark.parametrize(
    "change", [{"steps": "two"}, {"steps": '"2"'}, {"gamma": "[]"}, {"ops": "3"}, {"num_classes": "[" * 100_000}]
)
def test_broken_description(change: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match=f"expected the description of a program, got {next(iter(change))} = "):
        Description.of(ABOUT.metadata() | change)


GOOD = {
    "x_T": torch.zeros(3, 1, 8, 8),
    "labels": torch.tensor([0, 5, 9]),
    "noises": torch.zeros(3, 2, 1, 8, 8),
}


def test_good_inputs() -> None:
    taken: list[tuple[Tensor, ...]] = []

    def run(*tensors: Tensor) -> Tensor:
        taken.append(tensors)
        return tensors[0]

    Exported(ABOUT, run)(**GOOD)
    assert [id(tensor) for tensor in taken[0]] == [id(tensor) for tensor in GOOD.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.arange(3)}, "seeds: expected x_T, labels, noises, got seeds, x_T, labels, noises"),
        ({"labels": None}, "labels: expected x_T, labels, noises, got x_T, noises"),
        ({"x_T": [0.0]}, "x_T, labels, noises: expected tensors"),
        ({"x_T": torch.tensor(0.0)}, "x_T: expected 2 to 4 images, got 0"),
        ({"x_T": torch.zeros(1, 1, 8, 8)}, "x_T: expected 2 to 4 images, got 1"),
        ({"x_T": torch.zeros(5, 1, 8, 8)}, "x_T: expected 2 to 4 images, got 5"),
        ({"x_T": torch.zeros(3, 1, 8, 7)}, r"x_T: expected torch.float32 \[3, 1, 8, 8\], got .* \[3, 1, 8, 7\]"),
        ({"x_T": torch.zeros(3, 1, 8, 8).double()}, r"x_T: expected torch.float32 .*, got torch.float64"),
        ({"x_T": torch.full((3, 1, 8, 8), torch.nan)}, "x_T: expected finite numbers"),
        ({"labels": torch.tensor([0, 10, 0])}, "labels: expected 0 to 9, got 0 to 10"),
        ({"labels": torch.tensor([0, -1, 0])}, "labels: expected 0 to 9, got -1 to 0"),
        ({"labels": torch.tensor([0, 1])}, r"labels: expected torch.int64 \[3\], got torch.int64 \[2\]"),
        ({"noises": torch.zeros(3, 1, 1, 8, 8)}, r"noises: expected torch.float32 \[3, 2, 1, 8, 8\]"),
    ],
)
def test_bad_inputs(change: dict[str, Tensor], message: str) -> None:
    def run(*_: Tensor) -> Tensor:
        raise AssertionError("it ran")

    with pytest.raises(ConfigError, match=message):
        Exported(ABOUT, run)(**(GOOD | change))


def test_bad_seeds() -> None:
    about = replace(ABOUT, start="seeds", noises=0, num_classes=0)
    with pytest.raises(ConfigError, match=r"seeds: expected 0 to 9223372036854775807, got -1 to 1"):
        Exported(about, lambda seeds: seeds)(seeds=torch.tensor([-1, 1]))


def zipped(member: str, content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        package.writestr(member, content)
    return buffer.getvalue()


MEMBER = "a/data/aotinductor/model/a.wrapper_metadata.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt2", b"", "expected a whole .pt2 of ctm_fast.export"),
        ("a.pt2", zipped(MEMBER, "{}")[:-9], "expected a whole .pt2 of ctm_fast.export"),
        ("a.pt2", zipped("a.txt", "{}"), "got another zip"),
        ("a.pt2", zipped(MEMBER, "[]"), "got another zip"),
        ("a.pt2", zipped(MEMBER, '{"format": 1}'), "got another zip"),
        ("a.pt2", zipped(MEMBER, "{"), "expected a whole .pt2 of ctm_fast.export"),
        ("a.pt2", zipped(MEMBER, " " * (1 << 21)), "got another zip"),
        ("a.pt2", zipped(MEMBER, '{"format": "x"}'), "expected format ctm_fast.export.1, got 'x'"),
        ("a.onnx", b"", "expected an ONNX file of ctm_fast.export"),
        ("a.onnx", b"\x08\x07", "a.onnx: "),
        ("a.onnx", b"nonsense", "expected an ONNX file of ctm_fast.export"),
        ("a.safetensors", b"", "expected a .pt2 or .onnx file"),
    ],
)
def test_not_a_program(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_exported(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got no such file"):
        load_exported(tmp_path / "a.pt2")
    (tmp_path / "b.pt2").mkdir()
    with pytest.raises(CheckpointError, match="got a directory"):
        load_exported(tmp_path / "b.pt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_package_for_what_is_not_here(tmp_path: Path) -> None:
    about = replace(ABOUT, device="cuda", ops={"attention": "sdpa"})
    (tmp_path / "a.pt2").write_bytes(zipped(MEMBER, in_json(about)))
    with pytest.raises(ConfigError, match="was compiled for a GPU, and torch finds none"):
        load_exported(tmp_path / "a.pt2")
    about = replace(ABOUT, device="cuda", ops={"gamma_step": "cpp"})
    (tmp_path / "a.pt2").write_bytes(zipped(MEMBER, in_json(about)))
    with pytest.raises(ConfigError, match=r"calls ops of libctm_fast_cuda\.so: "):
        load_exported(tmp_path / "a.pt2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AOTI_MACHINE": "pdp11"}, "was compiled for pdp11, and this machine is "),
        ({"AOTI_CPU_ISA": "AVX512 AVX512_VNNI"}, "was compiled for AVX512, and torch finds AVX2 here"),
    ],
)
def test_package_of_another_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (tmp_path / "a.pt2").write_bytes(zipped(MEMBER, in_json(ABOUT, **change)))
    with pytest.raises(ConfigError, match=message):
        load_exported(tmp_path / "a.pt2")
    (tmp_path / "a.pt2").write_bytes(zipped(MEMBER, in_json(ABOUT, AOTI_CPU_ISA="AVX2")))
    with pytest.raises(CheckpointError, match="does not load into torch"):  # this processor's, but no code in it
        load_exported(tmp_path / "a.pt2")


def in_json(about: Description, **more: str) -> str:
    return json.dumps(about.metadata() | {"AOTI_MACHINE": platform.machine()} | more)
