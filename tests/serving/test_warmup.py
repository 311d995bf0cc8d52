"""What a warm-up makes of a model: the same images, by packed weights on a CPU and by graphs on CUDA."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctm_fast.errors import ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.models.prepacked import OneDNNConv2d, WinogradConv2d, prepack, unsupported
from ctm_fast.nn import Conv2d
from ctm_fast.serving import Sampler, load
from ctm_fast.serving.engine import divide
from ctm_fast.serving.request import check_plan
from tests.models.small import SMALL, random_network
from tests.serving.simulated_graphs import Graph, simulate
from tests.snapshots import save_snapshot

CLOSE = 1e-4

needs_onednn = pytest.mark.skipif(
    unsupported(torch.float32) is not None, reason=f"weights are packed by oneDNN: {unsupported(torch.float32)}"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def sampler(tmp_path: Path) -> Sampler:
    return load(save_snapshot(tmp_path / "ctm.safetensors", CTM), device="cpu")


def images(sampler: Sampler, *arguments: Any, **options: Any) -> Tensor:
    result = sampler(*arguments, **options)
    assert isinstance(result, Tensor)
    return result


@needs_onednn
@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("batch", [1, 5])
def test_packed_network(arch: str, batch: int, generator: torch.Generator) -> None:
    net = random_network(SMALL[arch], s_branch=True)
    packed = prepack(net, torch.float32)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    t = 10 * torch.rand(batch, generator=generator) + 0.1
    labels = torch.arange(batch) % 5
    with torch.no_grad():
        expected, got = net(x, t, t / 2, labels), packed(x, t, t / 2, labels)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_onednn
def test_every_convolution_is_packed_and_the_rest_is_shared() -> None:
    net = random_network(SMALL["ddpmpp"], s_branch=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    packed = prepack(net, torch.float32)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, Conv2d)]
    assert [
        name for name, module in packed.named_modules() if isinstance(module, WinogradConv2d | OneDNNConv2d)
    ] == convolutions
    assert not [module for module in packed.modules() if isinstance(module, nn.Conv2d)]
    ours = {parameter.data_ptr() for parameter in net.parameters()}
    assert {parameter.data_ptr() for parameter in packed.parameters()} < ours
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@needs_onednn
@pytest.mark.parametrize("kind", [CTM, EDMDenoiser])
def test_warmup_on_a_cpu(kind: Any, tmp_path: Path) -> None:
    sampler = load(save_snapshot(tmp_path / "a.safetensors", kind), device="cpu")
    expected = images(sampler, range(9), steps=3)
    said = sampler.warmup(batch_sizes=[1, 4], steps=3)
    assert said == "convolutions with packed weights"
    got = images(sampler, range(9), steps=3)
    assert (got - expected).abs().max() <= CLOSE
    packed = [
        module for module in sampler._engine._serving.modules() if isinstance(module, WinogradConv2d | OneDNNConv2d)
    ]
    assert packed
    sampler.warmup(batch_sizes=[2])  # and not packed again
    assert packed[0] in list(sampler._engine._serving.modules())


def test_warmup_says_what_it_cannot_do(tmp_path: Path) -> None:
    sampler = load(save_snapshot(tmp_path / "a.safetensors", CTM), device="cpu", dtype=torch.bfloat16)
    reason = unsupported(torch.bfloat16)
    expected = images(sampler, range(3))
    said = sampler.warmup(batch_sizes=[3])
    assert said == ("convolutions with packed weights" if reason is None else f"weights as they are: {reason}")
    assert (images(sampler, range(3)) - expected).abs().max() <= 0.1  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    ("count", "sizes", "parts"),
    [
        (0, (1, 8), []),
        (5, (1, 8, 64), [(5, 8)]),
        (8, (64, 8, 1), [(8, 8)]),
        (9, (1, 8, 64), [(9, 64)]),
        (130, (1, 8, 64), [(64, 64), (64, 64), (2, 8)]),
        (7, (3,), [(3, 3), (3, 3), (1, 3)]),
    ],
)
def test_divide(count: int, sizes: tuple[int, ...], parts: list[tuple[int, int]]) -> None:
    assert divide(count, sizes) == parts


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """CUDA graphs, simulated on the CPU."""
    return simulate(monkeypatch)


def capture(sampler: Sampler, sizes: list[int], **options: Any) -> None:
    """The warm-up of a CUDA device."""
    given = {"steps": None, "gamma": 0.0, "sigmas": None, "guidance": None, **options}
    sampler._engine._capture(sizes, check_plan(sampler.model, sampler.levels, **given))


@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (3, 0.5)])
def test_graphs_give_the_same_images(sampler: Sampler, graphs: list[Graph], steps: int, gamma: float) -> None:
    """Fewer rows than the graph has, as many, and more; labels as well; the second call leaves the first's images."""
    options: dict[str, Any] = {"steps": steps, "gamma": gamma}
    jobs: list[dict[str, Any]] = [
        {"seeds": range(start, start + count), "labels": label, **options}
        for start, count, label in [(0, 5, None), (50, 8, 3), (7, 1, None), (90, 19, 5), (0, 0, None)]
    ]
    expected = [images(sampler, **job) for job in jobs]
    expected8 = [images(sampler, **job, output="uint8") for job in jobs]
    capture(sampler, [1, 8], **options)
    assert [graph.replays for graph in graphs] == [0, 0]
    got = [images(sampler, **job) for job in jobs]
    got8 = [images(sampler, **job, output="uint8") for job in jobs]
    assert [graph.replays for graph in graphs] == [10, 2]  # of 8 images, and of 1
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= CLOSE
    for a8, b8 in zip(got8, expected8, strict=True):
        assert a8.dtype == torch.uint8 and a8.shape == b8.shape
        assert a8.numel() == 0 or (a8.int() - b8.int()).abs().max() <= 1
    images(sampler, range(3), steps=2, gamma=0.1)  # another plan is not in a graph
    assert [graph.replays for graph in graphs] == [10, 2]


def test_padded_rows_change_nothing(sampler: Sampler, graphs: list[Graph]) -> None:
    """Bit for bit, whatever an earlier call left there."""
    capture(sampler, [8])
    first = images(sampler, [4, 5, 6])
    images(sampler, range(100, 108), labels=7)
    assert torch.equal(images(sampler, [4, 5, 6]), first)


def test_graphs_in_many_threads(sampler: Sampler, graphs: list[Graph]) -> None:
    capture(sampler, [1, 4], steps=2, gamma=0.5)
    jobs = [range(i, i + 1 + i % 4) for i in range(48)]
    expected = [images(sampler, seeds, steps=2, gamma=0.5) for seeds in jobs]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda seeds: images(sampler, seeds, steps=2, gamma=0.5), jobs))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_cuda
@pytest.mark.parametrize(("steps", "gamma"), [(1, 0.0), (3, 0.5)])
def test_graphs_on_cuda(steps: int, gamma: float, tmp_path: Path) -> None:
    sampler = load(save_snapshot(tmp_path / "ctm.safetensors", CTM), device="cuda")
    torch.set_float32_matmul_precision("highest")  # load allows TF32
    torch.backends.cudnn.allow_tf32 = False
    jobs = [range(start, start + count) for start, count in [(0, 5), (50, 8), (7, 1), (90, 19)]]
    options: dict[str, Any] = {"steps": steps, "gamma": gamma}
    expected = [images(sampler, seeds, **options) for seeds in jobs]
    assert sampler.warmup([1, 8], **options) == "one CUDA graph for each batch of 1, 8"
    for seeds, wanted in zip(jobs, expected, strict=True):
        assert (images(sampler, seeds, **options) - wanted).abs().max() <= CLOSE
        pixels = images(sampler, seeds, output="uint8", **options)
        assert pixels.is_pinned()
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda seeds: images(sampler, seeds, **options), jobs * 20))
    torch.cuda.synchronize()
    for a, b in zip(got, expected * 20, strict=True):
        assert (a - b).abs().max() <= CLOSE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": []}, r"batch_sizes: expected integers in 1\.\.65536, got \[\]"),
        ({"batch_sizes": [8, 0]}, r"batch_sizes: .* got \[8, 0\]"),
        ({"batch_sizes": [10**9]}, "batch_sizes: .* got 1000000000"),
        ({"batch_sizes": 8}, "batch_sizes: expected a sequence of integers, got 8"),
        ({"gamma": 2}, "gamma: .* got 2"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas: .* got nan"),
    ],
)
def test_bad_warmup(sampler: Sampler, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, LevelError), match=message):
        sampler.warmup(**arguments)
