"""The sampler: an image is a function of its seed and class, in whatever company it is made."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from ctm_fast import hub
from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.errors import CheckpointError, ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser, load_model, save_model
from ctm_fast.ops import Stream, gamma_step, philox_normal, philox_words, use_reference
from ctm_fast.ops.reference import philox_normal as reference
from ctm_fast.sample import load
from ctm_fast.samplers import euler_sample, evaluations, generate, heun_sample, initial_noise, renoise_levels
from ctm_fast.serving import Sampler
from ctm_fast.serving.pixels import to_pictures
from tests.models.small import SMALL, random_network
from tests.snapshots import save_snapshot, small_config

ROOT = Path(__file__).parent.parent.parent

TOGETHER = 1e-5
"""How far an image may move with the batch it is in, in [-1, 1]: convolutions of another batch round differently."""


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("snapshots")
    return {
        "ctm": save_snapshot(folder / "ctm.safetensors", CTM),
        "unconditional": save_snapshot(folder / "unconditional.safetensors", CTM, classes=0),
        "teacher": save_snapshot(folder / "teacher.safetensors", EDMDenoiser),
    }


@pytest.fixture(scope="module")
def sampler(snapshots: dict[str, Path]) -> Sampler:
    return load(snapshots["ctm"], device="cpu")


def images(sampler: Sampler, *arguments: Any, **options: Any) -> Tensor:
    result = sampler(*arguments, **options)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (3, 0.0), (3, 0.5), (3, 1.0)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_image_of_a_seed_does_not_depend_on_the_batch(sampler: Sampler, batch: int, steps: int, gamma: float) -> None:
    seeds = list(range(20, 84))
    expected = images(sampler, seeds, steps=steps, gamma=gamma)
    divided = Sampler(sampler.model, sampler.levels, batch=batch)
    got = images(divided, seeds, steps=steps, gamma=gamma)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= TOGETHER


def test_image_of_a_seed_does_not_depend_on_the_order(sampler: Sampler) -> None:
    seeds = [5, 900, 2**63 - 1, 0, 5]
    got = images(sampler, seeds, steps=2, gamma=0.7, labels=3)
    assert torch.equal(got[0], got[4])
    reversed_ = images(sampler, seeds[::-1], steps=2, gamma=0.7, labels=3).flip(0)
    assert (got - reversed_).abs().max() <= TOGETHER
    assert (got[0] - got[1]).abs().max() > 0.1


@pytest.mark.parametrize("stream", [Stream.X_T, Stream.RENOISE])
def test_noise_is_the_same_in_any_batch(sampler: Sampler, stream: Stream) -> None:
    """The words are identical, the normals to 2e-6 of the reference's and, here, to the bit."""
    seeds = torch.arange(64) * 2**40 + 3
    shape = (3, 8, 8)
    words, whole = philox_words(seeds, 5, shape, stream=stream), philox_normal(seeds, 5, shape, stream=stream)
    assert (whole - reference.philox_normal(seeds, 5, shape, int(stream), False)).abs().max() <= 2e-6
    for batch in (1, 7):
        parts = [seeds[i : i + batch] for i in range(0, 64, batch)]
        assert torch.equal(torch.cat([philox_words(part, 5, shape, stream=stream) for part in parts]), words)
        assert torch.equal(torch.cat([philox_normal(part, 5, shape, stream=stream) for part in parts]), whole)
    assert torch.equal(initial_noise(seeds, shape, sampler.levels), 80 * philox_normal(seeds, 0, shape, stream=0))


def test_gamma_0_is_deterministic_and_gamma_is_felt(sampler: Sampler) -> None:
    seeds = range(8)
    first = images(sampler, seeds, steps=3)
    assert torch.equal(first, images(sampler, seeds, steps=3))
    noisy = images(sampler, seeds, steps=3, gamma=1.0)
    assert torch.equal(noisy, images(sampler, seeds, steps=3, gamma=1.0))  # its noise is of the seed, too
    assert (noisy - first).abs().max() > 0.01
    assert torch.equal(images(sampler, seeds, steps=1, gamma=1.0), images(sampler, seeds, steps=1))


def test_float(sampler: Sampler) -> None:
    x = images(sampler, range(5))
    assert (x.dtype, x.shape) == (torch.float32, (5, 1, 8, 8))
    assert -1 <= x.min() < x.max() <= 1


def test_uint8_is_rounded(sampler: Sampler) -> None:
    x = images(sampler, range(64)).permute(0, 2, 3, 1)
    x8 = images(sampler, range(64), output="uint8")
    assert (x8.dtype, x8.shape) == (torch.uint8, (64, 8, 8, 1))
    levels = 127.5 * x.double() + 127.5
    inside = (levels > 0) & (levels < 255)
    assert inside.sum() > 100
    assert (x8.double() - levels).abs().max() <= 0.5 + 1e-4  # truncation would reach 1
    assert (x8.double() - levels)[inside].mean().abs() < 0.05  # and lie 0.5 below on average


def test_pil(sampler: Sampler) -> None:
    pictures = sampler(range(3), output="pil")
    assert isinstance(pictures, list)
    x8 = images(sampler, range(3), output="uint8")
    for picture, array in zip(pictures, x8, strict=True):
        assert isinstance(picture, Image.Image)
        assert (picture.size, picture.mode) == ((8, 8), "L")
        assert np.array_equal(np.asarray(picture), array[..., 0])


def test_pictures_in_colour(generator: torch.Generator) -> None:
    pixels = torch.randint(256, (2, 4, 5, 3), generator=generator, dtype=torch.uint8)
    for picture, array in zip(to_pictures(pixels), pixels, strict=True):
        assert (picture.size, picture.mode) == ((5, 4), "RGB")
        assert np.array_equal(np.asarray(picture), array)


@pytest.mark.parametrize(
    "how", [{"steps": 1}, {"steps": 2}, {"steps": 5}, {"sigmas": (9.0, 3.0, 1.0)}, {"steps": 3, "guidance": 2.0}]
)
@pytest.mark.parametrize("kind", ["ctm", "teacher"])
def test_evaluations_are_counted_right(snapshots: dict[str, Path], kind: str, how: dict[str, Any]) -> None:
    model = load(snapshots[kind], device="cpu").model
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    generate(model, Levels(), torch.arange(2), torch.zeros(2, dtype=torch.int64), **how)
    assert len(calls) == evaluations(model, **how)


@pytest.mark.parametrize("steps", [1, 3])
def test_every_backend_makes_the_same_images(sampler: Sampler, steps: int) -> None:
    """Before and after the warm-up, and in plain PyTorch: the same noise, and images to rounding."""
    with use_reference():
        expected = images(sampler, range(6), steps=steps, gamma=0.5)
    cold = images(sampler, range(6), steps=steps, gamma=0.5)
    sampler.warmup([6])
    warm = images(sampler, range(6), steps=steps, gamma=0.5)
    for found in (cold, warm):
        assert (found - expected).abs().max() <= 1e-4


def test_no_seeds(sampler: Sampler) -> None:
    assert images(sampler, []).shape == (0, 1, 8, 8)
    assert images(sampler, [], output="uint8").shape == (0, 8, 8, 1)
    assert sampler([], output="pil") == []


def test_labels(sampler: Sampler) -> None:
    assert sampler.labels_of([0, 9, 10, 23]) == [0, 9, 0, 3]
    assert sampler.labels_of([4, 5], 7) == [7, 7]
    by_default = images(sampler, [0, 11, 22])
    assert torch.equal(by_default, images(sampler, [0, 11, 22], labels=[0, 1, 2]))
    assert (by_default - images(sampler, [0, 11, 22], labels=9)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, list])
def test_integers_of_any_kind(sampler: Sampler, kind: Any) -> None:
    seeds, labels = kind([3, 4]), kind([1, 2])
    assert torch.equal(images(sampler, seeds, labels=labels), images(sampler, [3, 4], labels=[1, 2]))


def test_unconditional(snapshots: dict[str, Path]) -> None:
    sampler = load(snapshots["unconditional"], device="cpu")
    assert sampler.num_classes == 0
    assert sampler.labels_of([1, 2]) is None
    assert images(sampler, range(3), steps=2, gamma=0.5).shape == (3, 1, 8, 8)
    with pytest.raises(ConfigError, match="labels: expected None for an unconditional model"):
        sampler([1], labels=0)


def test_teacher(snapshots: dict[str, Path]) -> None:
    sampler = load(snapshots["teacher"], device="cpu")
    one, eighteen = images(sampler, range(4)), images(sampler, range(4), steps=18)
    assert one.shape == eighteen.shape == (4, 1, 8, 8)
    assert (one - eighteen).abs().max() > 0.01
    with pytest.raises(ConfigError, match=r"gamma: expected 0 for a teacher.* got 0\.5"):
        sampler([1], gamma=0.5)


def test_bfloat16(snapshots: dict[str, Path], sampler: Sampler) -> None:
    """Within 2e-2 on average in [-1, 1]: bfloat16 keeps 8 bits, and the preconditioning stays in float32."""
    x = images(sampler, range(64))
    rough = images(load(snapshots["ctm"], device="cpu", dtype=torch.bfloat16), range(64))
    assert rough.dtype == torch.float32
    assert 0 < (rough - x).abs().mean() <= 2e-2


def test_levels_of_ones_own(sampler: Sampler) -> None:
    """Those of the steps give the same to the bit; others are what the formulas say, jump by jump."""
    seeds = range(6)
    same = sampler_sigmas(3, sampler.levels)
    expected = images(sampler, seeds, steps=3, gamma=0.4)
    for given in (same, same.tolist(), torch.from_numpy(same), iter(same)):
        assert torch.equal(images(sampler, seeds, sigmas=given, gamma=0.4), expected)
    sigmas = [40.0, 3.0, 0.25, 0.01]
    rows, labels = torch.arange(6), torch.arange(6)
    model = sampler.model
    assert isinstance(model, CTM)

    def full(level: float) -> Tensor:
        return torch.full((6,), level)

    x = 40 * philox_normal(rows, 0, (1, 8, 8), stream=Stream.X_T)
    lower = renoise_levels(sigmas, 0.4)
    with torch.no_grad():
        for i, (t, s, t_next) in enumerate(zip(sigmas, lower, sigmas[1:], strict=False)):
            noise = philox_normal(rows, i, (1, 8, 8), stream=Stream.RENOISE)
            x = model.jump(x, full(t), full(s), labels) + (t_next**2 - s**2) ** 0.5 * noise
    got = images(sampler, seeds, sigmas=sigmas, gamma=0.4)
    assert (got - x.clamp(-1, 1)).abs().max() <= TOGETHER
    assert (got - images(sampler, seeds, steps=3, gamma=0.4)).abs().max() > 0.01


def test_levels_of_ones_own_for_a_teacher(snapshots: dict[str, Path]) -> None:
    sampler = load(snapshots["teacher"], device="cpu")
    same = karras_sigmas(5, sampler.levels)
    assert torch.equal(images(sampler, range(4), sigmas=same), images(sampler, range(4), steps=5))
    assert torch.equal(images(sampler, range(4), sigmas=[80.0]), images(sampler, range(4)))
    x = 9 * philox_normal(torch.arange(4), 0, (1, 8, 8), stream=Stream.X_T)
    with torch.no_grad():
        expected = heun_sample(lambda x, t: sampler.model.denoise(x, t, torch.arange(4)), x, [9.0, 1.0])
    assert (images(sampler, range(4), sigmas=[9, 1]) - expected.clamp(-1, 1)).abs().max() <= TOGETHER


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance(arch: str, weight: float) -> None:
    """Both are affine in the network's output: weight the outputs, and make one jump of them."""
    levels = small_config(0).levels
    net = random_network(replace(SMALL[arch], label_dropout=0.1), s_branch=True)
    model = CTM(net)
    seeds, labels = torch.tensor([3, 7, 2**40]), torch.tensor([4, 0, 2])
    sigmas, gamma = [80.0, 2.0, 0.002], 0.6
    x = 80 * philox_normal(seeds, 0, (3, 8, 8), stream=Stream.X_T)
    with torch.no_grad():
        for i, (t, s, t_next) in enumerate(zip(sigmas, renoise_levels(sigmas, gamma), sigmas[1:], strict=False)):
            t_, s_, next_ = (torch.full((3,), level) for level in (t, s, t_next))
            weak = model.raw(x, t_, s_, torch.zeros(3, 5))
            F_x = weak + weight * (model.raw(x, t_, s_, labels) - weak)
            x = gamma_step(x, F_x, t_, s_, next_, seeds, i)
    got = images(Sampler(model, levels), seeds, sigmas=sigmas, gamma=gamma, labels=labels, guidance=weight)
    assert (got - x.clamp(-1, 1)).abs().max() <= 1e-4
    plain = images(Sampler(model, levels), seeds, sigmas=sigmas, gamma=gamma, labels=labels)
    assert ((got - plain).abs().max() <= 1e-4) == (weight == 1.0)


def test_guidance_of_a_teacher() -> None:
    net = random_network(replace(SMALL["ddpmpp"], label_dropout=0.1), s_branch=False)
    model = EDMDenoiser(net)
    sampler = Sampler(model, small_config(0).levels)
    x = 80 * philox_normal(torch.arange(3), 0, (3, 8, 8), stream=Stream.X_T)
    with torch.no_grad():
        strong, weak = (
            euler_sample(lambda x, t, y=y: model.denoise(x, t, y), x, [80.0])
            for y in (torch.arange(3), torch.zeros(3, 5))
        )
    assert (images(sampler, range(3), guidance=3.0) - (3 * strong - 2 * weak).clamp(-1, 1)).abs().max() <= 1e-4


def test_threads_keep_what_is_theirs(sampler: Sampler) -> None:
    """A call changes neither grad mode nor the number of threads, in its own thread or another."""

    def call(seed: int) -> tuple[bool, bool, int, bool]:
        torch.set_grad_enabled(seed % 2 == 0)
        image = images(sampler, [seed], steps=2, gamma=0.5)
        return (
            torch.is_grad_enabled() == (seed % 2 == 0),
            torch.is_inference_mode_enabled() or image.is_inference(),
            torch.get_num_threads(),
            image.requires_grad,
        )

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(call, range(64))) == {(True, False, 1, False)}
    assert torch.is_grad_enabled()


def test_threads_at_once(sampler: Sampler) -> None:
    """Sixteen threads on one sampler, each with its own seeds, levels and noise."""
    jobs = [(range(i, i + 5), 1 + i % 3, 0.25 * (i % 4)) for i in range(64)]
    expected = [images(sampler, seeds, steps=steps, gamma=gamma) for seeds, steps, gamma in jobs]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda job: images(sampler, job[0], steps=job[1], gamma=job[2]), jobs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_calls_leave_no_gradients_and_no_random_state(sampler: Sampler) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert not images(sampler, range(3), steps=3, gamma=1.0).requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [-1]}, r"seeds: expected integers in 0\.\.9223372036854775807, got -1"),
        ({"seeds": [2**63]}, "seeds: .* got 9223372036854775808"),
        ({"seeds": [0.5]}, r"seeds: .* got 0\.5"),
        ({"seeds": "12"}, "seeds: .* got '1'"),
        ({"seeds": 7}, "seeds: expected a sequence of integers, got 7"),
        ({"steps": 0}, "steps: .* got 0"),
        ({"steps": 10_001}, "steps: .* got 10001"),
        ({"steps": 1.5}, r"steps: .* got 1\.5"),
        ({"gamma": -0.1}, r"gamma: .* got -0\.1"),
        ({"gamma": 1.1}, r"gamma: .* got 1\.1"),
        ({"gamma": float("nan")}, "gamma: .* got nan"),
        ({"gamma": "0.5"}, r"gamma: .* got '0\.5'"),
        ({"gamma": 10**400}, "gamma: expected a number, got 1000"),
        ({"labels": 10}, r"labels: expected integers in 0\.\.9, got 10"),
        ({"labels": [0, -1]}, "labels: .* got -1"),
        ({"labels": [1]}, "labels: expected 2, one for each seed, got 1"),
        ({"labels": 0.5}, r"labels: .* got 0\.5"),
        ({"output": "jpeg"}, "output: expected one of float, uint8, pil, got 'jpeg'"),
        ({"seeds": range(1_000_001)}, "seeds: expected at most 1000000 in a call, got more"),
        ({"seeds": range(10**30)}, "seeds: expected a sequence of integers, got range"),
        ({"seeds": iter(int, 1)}, "seeds: expected at most 1000000 in a call, got more"),
        ({"seeds": np.float32(3)}, "seeds: expected a sequence of integers, got"),
        ({"seeds": np.array(3)}, "seeds: expected a sequence of integers, got array"),
        ({"labels": torch.tensor(3.0)}, "labels: expected"),
        ({"sigmas": []}, "sigmas: expected at least 2 levels, got 0"),
        ({"sigmas": [80.0]}, "sigmas: expected at least 2 levels, got 1"),
        ({"sigmas": [80.0, float("nan")]}, r"sigmas: expected levels in 0\.002\.\.80\.0, .* got nan"),
        ({"sigmas": [float("inf"), 1.0]}, "sigmas: .* got inf"),
        ({"sigmas": [80.1, 1.0]}, r"sigmas: .* got 80\.1"),
        ({"sigmas": [80.0, 0.001]}, r"sigmas: .* got 0\.001"),
        ({"sigmas": [80.0, 1.0, 1.0]}, r"sigmas: expected strictly decreasing levels, got 1\.0 then 1\.0"),
        ({"sigmas": [1.0, 80.0]}, "sigmas: expected strictly decreasing"),
        ({"sigmas": "80"}, "sigmas: expected a list of levels, got '80'"),
        ({"sigmas": 80.0}, r"sigmas: expected a list of levels, got 80\.0"),
        ({"sigmas": [80.0, "low"]}, "sigmas: expected numbers, got 'low'"),
        ({"sigmas": [80.0, None]}, "sigmas: expected numbers, got None"),
        ({"sigmas": [10**400, 1.0]}, "sigmas: expected numbers, got 1000"),
        ({"sigmas": np.linspace(80, 1, 10_002)}, "sigmas: expected at most 10001 levels, got more"),
        ({"sigmas": [80.0, 1.0], "steps": 1}, "steps: expected none beside sigmas, .* got 1"),
        ({"guidance": 2.0}, "guidance: expected None for a model that was not trained with label dropout, got 2"),
        ({"guidance": float("nan")}, r"guidance: expected a number in 0\.\.1000, got nan"),
        ({"guidance": -1}, "guidance: .* got -1"),
        ({"guidance": "2"}, "guidance: expected a number, got '2'"),
        ({"guidance": 10**400}, "guidance: expected a number, got 1000"),
    ],
)
def test_bad_arguments(
    sampler: Sampler, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler._engine, "run", None)  # it is refused before any work
    with pytest.raises((ConfigError, LevelError), match=message) as caught:
        sampler(**{"seeds": [0, 1], **arguments})
    assert isinstance(caught.value, ValueError)


def test_the_models_device_is_current_in_every_thread(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with cuda:0, on which Triton would launch kernels for memory of cuda:1."""
    seen: list[object] = []
    current: list[object] = []

    @contextlib.contextmanager
    def device(chosen: object) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    def run(*args: object, **kwargs: object) -> Tensor:
        seen.append(list(current))
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(sampler._engine, "device", torch.device("cuda", 1))
    monkeypatch.setattr(sampler._engine, "_eager", run)
    monkeypatch.setattr(sampler._engine, "_capture", run)
    sampler([0])
    sampler.warmup([1])
    with sampler.serve() as server:
        server.submit([0]).result()
    assert seen == [[torch.device("cuda", 1)]] * 3
    assert current == []


def test_bad_load(snapshots: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype: .* got torch\.int64"):
        load(snapshots["ctm"], device="cpu", dtype=torch.int64)
    with pytest.raises(ConfigError, match="device: expected cpu or cuda, got 'meta'"):
        load(snapshots["ctm"], device="meta")
    model, _ = load_model(snapshots["ctm"])
    for name, config in (("none", {}), ("crossed", {"config": {"levels": {"sigma_min": 90.0}}})):
        save_model(tmp_path / name, model, small_config(10).network, config)
        with pytest.raises(CheckpointError, match=f"{name}: expected the noise levels of the model"):
            load(tmp_path / name, device="cpu")


@pytest.mark.parametrize("batch", [0, -1, 2.5, 10**9])
def test_bad_batch(sampler: Sampler, batch: Any) -> None:
    with pytest.raises(ConfigError, match="batch: expected integers in"):
        Sampler(sampler.model, sampler.levels, batch=batch)


def test_load_with_threads(snapshots: dict[str, Path]) -> None:
    load(snapshots["ctm"], device="cpu", threads=2)
    assert torch.get_num_threads() == 2
    load(snapshots["ctm"], device="cpu")
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match="threads: expected 1 to 1024, got 0"):
        load(snapshots["ctm"], device="cpu", threads=0)


def test_load_a_folder_or_a_repository(
    snapshots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's cache has it, without a network; a path of that name comes first."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    expected = images(load(snapshots["ctm"], device="cpu"), range(2))
    model, metadata = load_model(snapshots["ctm"])
    repository = tmp_path / "cache" / "models--user--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    hub.save_pretrained(model, snapshot, metadata)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for place in (snapshot, str(snapshot), "user/name", Path("user/name")):
        assert torch.equal(images(load(place, device="cpu"), range(2)), expected)
    with pytest.raises(CheckpointError, match=r"^no/such: expected a file, a folder or a repository of the Hub"):
        load("no/such", device="cpu")
    for place in ("no/such.safetensors", "no", "/no/such", "no/such/place", "x" * 300):
        with pytest.raises(CheckpointError, match=f"^{place}: (?!.*Hub)"):
            load(place, device="cpu")
    hub.save_pretrained(load_model(snapshots["unconditional"])[0], tmp_path / "user/name", metadata)
    assert load("user/name", device="cpu").num_classes == 0


def test_a_repository_without_the_extra() -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
from ctm_fast.sample import load
try:
    load("user/name", device="cpu")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("user/name: expected a file, a folder or a repository of the Hub: no such path")
    assert "pip install ctm_fast[hub]" in done.stdout
