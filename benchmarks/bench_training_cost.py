"""What a CTM step costs beside the same mathematics written the published way (``tests/training/naive.py``).

M = 17, k = E[k] = 12, a DDPM++ of 6.5 M parameters at 32x32, eagerly, float32. Three ways: ``fast``; ``naive``, with
the same modules and kernels; ``naive, plain NCHW``, in PyTorch's own modules. Forward-equivalents are counted by calls
of the networks: a sample once through one is 1, its gradient to the input 1, to weights as well 2. Operations are all
products and convolutions, also of what measures distances and of the discriminator; LPIPS' weights are random.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.harness import DEVICE, Comparison, Way, compare
from benchmarks.plain_unet import plain
from ctm_fast.diffusion.draws import draw_dsm_sigmas, draw_jumps
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.losses import AdversarialLoss, distance
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import EfficientNetLite0, feature_shapes
from ctm_fast.models.prepacked import pack_winograd
from ctm_fast.training.config import CTMConfig
from ctm_fast.training.ctm_step import Adversary, CTMStep, Piece
from ctm_fast.training.regions import Regions
from tests.losses.perceptual_files import write_random_files
from tests.training.evaluations import Evaluations
from tests.training.naive import NaiveStep

BATCH = 8
K = 12
SETTINGS = CTMConfig(points=18, max_solver_steps=17)
NETWORK = NetworkConfig(img_resolution=32, model_channels=64, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(16,))
FAST, NAIVE, PLAIN = Way("fast", None), Way("naive", None), Way("naive, plain NCHW", "reference")
WAYS = (FAST, NAIVE, PLAIN)


def batch() -> Piece:
    """One batch with k = ``K``; the share of its rows with s = u or s = sigma_min is as expected at that k."""
    levels = Levels()
    step = next(
        step
        for step in range(10_000)
        if (jumps := _jumps(step)).k == K
        and abs((jumps.s == jumps.u).mean() - _STAYS) < 0.5 / BATCH
        and abs((jumps.s == levels.sigma_min).mean() - _STAYS) < 0.5 / BATCH
    )
    jumps = _jumps(step)
    sigma = draw_dsm_sigmas(slice(0, BATCH), levels, seed=0, step=step)
    x0, noise, dsm_noise = torch.randn(3, BATCH, 3, 32, 32, device=DEVICE).unbind()

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(values).float().to(DEVICE)

    return Piece(
        x0=0.5 * x0, noise=noise, way=tensor(jumps.way), s=tensor(jumps.s), stays_u=jumps.s == jumps.u,
        stays_end=jumps.s == levels.sigma_min, sigma=tensor(sigma), dsm_noise=dsm_noise, labels=None,
        seeds=torch.arange(BATCH, device=DEVICE), step=step,
    )  # fmt: skip


def _jumps(step: int) -> Any:
    return draw_jumps(slice(0, BATCH), SETTINGS.points, SETTINGS.max_solver_steps, Levels(), seed=0, step=step)


_STAYS = sum(1 / n for n in range(1, SETTINGS.points - K + 1)) / (SETTINGS.points - K)
"""P(s = u) = P(s = sigma_min) at k = ``K``: t is uniform, and s among the n levels from u on."""


def steps(name: str, *, adversarial: bool = False, pack: bool = True) -> dict[Way, NaiveStep | CTMStep]:
    """The three ways, each with networks of its own and the same weights; the fast one's teacher packed if ``pack``."""
    torch.manual_seed(0)
    net = build_network(NETWORK, s_branch=True).to(DEVICE)
    teacher_net = build_network(NETWORK, s_branch=False).to(DEVICE)
    made: dict[Way, NaiveStep | CTMStep] = {}
    for way in WAYS:
        shape: Callable[[Any], Any] = plain if way == PLAIN else copy.deepcopy
        # Dropout is 0 in plain modules: in all, to be alike.
        student, target, teacher = CTM(copy.deepcopy(net)), CTM(copy.deepcopy(net)), EDMDenoiser(teacher_net)
        student.net, target.net, teacher.net = shape(net), shape(net), shape(teacher_net)
        student.eval().requires_grad_(True)
        target.eval().requires_grad_(False)
        teacher.eval().requires_grad_(False)
        arguments: dict[str, Any] = {
            "settings": replace(SETTINGS, distance=name),
            "distance": _distance(name),
            "sigma_min": 0.002,
            "adversary": _adversary() if adversarial else None,
        }
        if way == FAST:
            if pack:
                teacher.net = pack_winograd(teacher.net, torch.float32)  # as a CTM stage has it
            made[way] = CTMStep(student, target, teacher, regions=Regions(compile=False, device=DEVICE), **arguments)
        else:
            made[way] = NaiveStep(student, target, teacher, **arguments)
    return made


def _distance(name: str) -> Distance:
    if name != "lpips":
        return distance(name, c=0.03, device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        vgg16, heads = write_random_files(Path(folder))
        return distance(name, c=0.03, vgg16=vgg16, lpips_heads=heads, device=DEVICE)


def _adversary() -> Adversary:
    features = EfficientNetLite0(size=128).to(DEVICE)
    heads = ProjectedDiscriminator([feature_shapes(features, 32, DEVICE)], seed=0).to(DEVICE)
    return Adversary(AdversarialLoss([features], heads))


def generator_step(step: NaiveStep | CTMStep, piece: Piece, *, adversarial: bool) -> Tensor:
    """Solver, target, losses and gradients; the loss."""
    if isinstance(step, NaiveStep):
        target = step.consistency_target(step.solve(piece), piece)
        terms = step.backward(piece, target, adversarial=adversarial)
    else:
        target = step.consistency_target(step.solve(piece.x_t, piece.way, piece.labels), piece)
        terms = step.backward([(piece, target)], adversarial=adversarial)
    step.student.zero_grad(set_to_none=True)
    return terms["loss"]


def discriminator_step(step: NaiveStep | CTMStep, piece: Piece) -> Tensor:
    """Fake, both judgements and the heads' gradients; the loss."""
    loss = step.discriminator_loss(piece) if isinstance(step, NaiveStep) else step.judge(piece).loss.mean()
    loss.backward()
    assert step.adversary is not None
    step.adversary.loss.discriminator.zero_grad(set_to_none=True)
    return loss


def networks(step: NaiveStep | CTMStep) -> list[CTM | EDMDenoiser]:
    """Student, target and teacher."""
    if isinstance(step, CTMStep):
        return [step.student, step.target_jump.__self__, step.teacher_denoise.__self__]  # type: ignore[attr-defined]
    assert step.teacher is not None
    return [step.student, step.target, step.teacher]


def counted(calls: dict[Way, Callable[[], Tensor]], made: dict[Way, NaiveStep | CTMStep]) -> dict[Way, float]:
    counts = {}
    for way, call in calls.items():
        step = made[way]
        with way.serving():
            counts[way] = Evaluations(networks(step)).of(call) / BATCH
    return counts


class Operations(TorchDispatchMode):
    """Counts those of PyTorch's products and convolutions. FlopCounterMode follows modules, which a tail pulled apart
    from its network breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(call: Callable[[NaiveStep | CTMStep], Tensor], made: dict[Way, NaiveStep | CTMStep]) -> float:
    """Those of the fast way over those of the naive one, both in plain PyTorch, which the counter knows."""
    counts = {}
    for way in (FAST, NAIVE):
        with PLAIN.serving(), Operations() as operations_of:
            call(made[way])
        counts[way] = operations_of.count
    return counts[FAST] / counts[NAIVE]


def record(benchmark: BenchmarkFixture, result: Comparison, counts: dict[Way, float], **figures: float) -> None:
    result.figures |= {f"forward-equivalents, {way.name}": count for way, count in counts.items()} | figures
    benchmark.extra_info["figures"] = result.figures


@pytest.mark.parametrize(
    ("name", "adversarial"),
    [("pseudo-huber", False), ("efflite0", False), ("efflite0", True), ("lpips", False), ("lpips", True)],
    ids=["pseudo-huber", "efflite0", "efflite0, adversarial", "lpips", "lpips, adversarial"],
)
def test_generator_step(benchmark: BenchmarkFixture, name: str, adversarial: bool) -> None:
    piece = batch()
    of_naive = operations(
        lambda step: generator_step(step, piece, adversarial=adversarial),
        steps(name, adversarial=adversarial, pack=False),
    )
    made = steps(name, adversarial=adversarial)
    calls: dict[Way, Callable[[], Tensor]] = {
        way: lambda way=way: generator_step(made[way], piece, adversarial=adversarial)  # type: ignore[misc]
        for way in WAYS
    }
    counts = counted(calls, made)
    fast = made[FAST]
    assert isinstance(fast, CTMStep)
    solver = Way("its teacher", None)
    calls[solver] = lambda: fast.solve(piece.x_t, piece.way, None)
    result = compare(benchmark, calls, baseline=NAIVE, serves=("group_norm_silu",), rounds=5)
    share = result.median(solver.name) / result.median(FAST.name)
    record(benchmark, result, counts, teacher=share, **{"operations, of naive's": of_naive})
    assert counts[FAST] < counts[NAIVE] == counts[PLAIN]


def test_discriminator_step(benchmark: BenchmarkFixture) -> None:
    piece = batch()
    of_naive = operations(
        lambda step: discriminator_step(step, piece), steps("pseudo-huber", adversarial=True, pack=False)
    )
    made = steps("pseudo-huber", adversarial=True)
    calls: dict[Way, Callable[[], Tensor]] = {
        way: lambda way=way: discriminator_step(made[way], piece)  # type: ignore[misc]
        for way in WAYS
    }
    counts = counted(calls, made)
    result = compare(benchmark, calls, baseline=NAIVE, serves=("group_norm_silu",), rounds=5)
    record(benchmark, result, counts, **{"operations, of naive's": of_naive})
    assert counts[FAST] < counts[NAIVE] == counts[PLAIN]
