"""Every choice of networks, levels and weights, whole and in pieces, against the published way of writing it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctm_fast.diffusion.draws import draw_dsm_sigmas, draw_jumps
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.losses import AdversarialLoss, distance
from ctm_fast.models import ARCHITECTURES, CTM, EDMDenoiser
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import feature_shapes
from ctm_fast.training.config import CTMConfig
from ctm_fast.training.ctm_step import Adversary, CTMStep, Piece
from ctm_fast.training.regions import Regions
from tests.models.small import SMALL, random_network
from tests.training.naive import NaiveStep, gradients

BATCH, POINTS = 6, 6
SEED = 12
"""Of a batch with k = 2; at s = u lie two of its levels, at s = sigma_min three."""
CPU = torch.device("cpu")


class Maps(nn.Module):
    """Three maps of 16, 8 and 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(
            torch.randn(width, before, 3, 3, generator=generator) / (9 * before) ** 0.5
            for before, width in ((3, 8), (8, 8), (8, 8))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        h = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
        maps = []
        for weight in self.weights:
            h = nn.functional.silu(nn.functional.conv2d(h, weight, stride=2, padding=1))
            maps.append(h)
        return maps


def draw(settings: CTMConfig, seed: int, positions: slice = slice(0, BATCH), *, batch: int = BATCH) -> Piece:
    """A batch, or the positions of it that are asked for; among its levels are s = u and s = sigma_min."""
    levels = Levels()
    jumps = draw_jumps(
        positions, settings.points, settings.max_solver_steps, levels, seed=seed, step=0,
        k_strategy=settings.k_strategy, k_power=settings.k_power, s_strategy=settings.s_strategy,
    )  # fmt: skip
    sigma = draw_dsm_sigmas(positions, levels, seed=seed, step=0, law=settings.dsm_law)
    generator = torch.Generator().manual_seed(seed)
    x0, noise, dsm_noise = torch.randn(3, batch, 3, 8, 8, generator=generator)[:, positions].unbind()
    labels = torch.arange(batch)[positions] % 5
    return Piece(
        x0=0.5 * x0, noise=noise, way=torch.from_numpy(jumps.way).float(), s=torch.from_numpy(jumps.s).float(),
        stays_u=jumps.s == jumps.u, stays_end=jumps.s == levels.sigma_min, sigma=torch.from_numpy(sigma).float(),
        dsm_noise=dsm_noise, labels=labels, seeds=torch.arange(batch)[positions], step=0,
    )  # fmt: skip


def steps(
    settings: CTMConfig, *, arch: str = "ddpmpp", fake: str = "estimate", adversarial: bool = False
) -> tuple[NaiveStep, CTMStep]:
    config = SMALL[arch]
    student, target = (CTM(random_network(config, s_branch=True, seed=seed)) for seed in (1, 2))
    student.requires_grad_(True).train()
    target.requires_grad_(False).train()
    teacher = EDMDenoiser(random_network(config, s_branch=False, seed=3)).requires_grad_(False)
    adversary = None
    if adversarial:
        features = Maps()
        shapes = [feature_shapes(features, 8)]
        heads = ProjectedDiscriminator(shapes, seed=0, width=8).eval()  # in training, its norms know of pieces
        adversary = Adversary(AdversarialLoss([features], heads), 0.7, fake)
    arguments: dict[str, Any] = {
        "settings": settings,
        "distance": distance("l2", c=0.03),
        "sigma_min": 0.002,
        "adversary": adversary,
    }
    guide = teacher if settings.solver == "teacher" else None
    fast = CTMStep(student, target, guide, regions=Regions(compile=False, device=CPU), **arguments)
    return NaiveStep(student, target, guide, **arguments), fast


def assert_same_step(settings: CTMConfig, *, adversarial: bool = False, pieces: int = 1, **options: Any) -> None:
    naive, fast = steps(settings, adversarial=adversarial, **options)
    seed = SEED
    whole = draw(settings, seed)
    expected_target = naive.consistency_target(naive.solve(whole), whole)
    expected = naive.backward(whole, expected_target, adversarial=adversarial)
    expected_gradients = gradients(naive.student)

    parts = [draw(settings, seed, slice(i, i + BATCH // pieces)) for i in range(0, BATCH, BATCH // pieces)]
    targets = [(part, fast.consistency_target(fast.solve(part.x_t, part.way, part.labels), part)) for part in parts]
    torch.testing.assert_close(torch.cat([target for _, target in targets]), expected_target, rtol=1e-5, atol=1e-5)
    terms = fast.backward(targets, adversarial=adversarial)
    for name, value in expected.items():
        torch.testing.assert_close(
            terms[name].mean(), value, rtol=2e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    got = gradients(fast.student)
    assert sum(bool(gradient.any()) for gradient in got.values()) > len(got) / 2
    for name, gradient in expected_gradients.items():
        # A bias before the norm of a single channel has gradient 0: what is there is rounding.
        assert (got[name] - gradient).abs().max() <= 3e-5 * gradient.abs().max() + 1e-7, name


BASE = CTMConfig(points=POINTS, max_solver_steps=3)

CHOICES: dict[str, dict[str, Any]] = {
    "published": {},
    "block": {"adaptive_layer": "block"},
    "consistency model": {
        "s_strategy": "smallest",
        "target_inner": "target-sg",
        "dsm_weight": 0.0,
        "max_solver_steps": 1,
    },
    "self": {"solver": "self"},
    "self-iterated": {"solver": "self-iterated"},
    "outer student": {"estimate_outer": "student"},
    "inner student-sg": {"estimate_inner": "student-sg", "estimate_outer": "student"},
    "inner target-sg": {"estimate_inner": "target-sg", "estimate_outer": "student"},
    "target target-sg": {"target_inner": "target-sg"},
    "target none": {"target_inner": "none"},
    "matching": {"target_matching": True},
    "weighting": {"weighting": "truncated-snr"},
    "constant": {"adaptive": False, "dsm_weight": 0.5},
    "lognormal, uniform k": {"dsm_law": "lognormal", "k_strategy": "uniform"},
    "whole way": {"k_strategy": "fixed", "max_solver_steps": POINTS - 1},
}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_as_the_published_way(choice: str, pieces: int) -> None:
    assert_same_step(replace(BASE, **CHOICES[choice]), pieces=pieces)


def test_weights_of_each_piece_as_of_a_batch_of_its_own() -> None:
    """Pieces of 1 and 5: the published weight has 1e-4 beside the norm, so norms must be those of a piece's means."""
    settings = replace(BASE, adaptive_scope="microbatch")
    naive, fast = steps(settings)
    parts = [draw(settings, 11, part) for part in (slice(0, 1), slice(1, BATCH))]
    targets = [fast.consistency_target(fast.solve(part.x_t, part.way, part.labels), part) for part in parts]
    expected: dict[str, Tensor] = {}
    weight = 0.0
    for part, target in zip(parts, targets, strict=True):
        share = len(part.x0) / BATCH
        terms = naive.backward(part, target)
        weight += share * float(terms["lambda_dsm"])
        for name, gradient in gradients(naive.student).items():
            expected[name] = expected.get(name, torch.zeros(())) + share * gradient
    found = fast.backward(list(zip(parts, targets, strict=True)))
    assert float(found["lambda_dsm"]) == pytest.approx(weight, rel=1e-6)
    got = gradients(fast.student)
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 3e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "ddpmpp"])
def test_architectures(arch: str) -> None:
    assert_same_step(replace(BASE, adaptive_layer="block" if arch == "adm" else "output"), arch=arch, pieces=2)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("choice", ["published", "outer student", "inner target-sg"])
@pytest.mark.parametrize("fake", ["estimate", "jump"])
def test_adversarial(choice: str, fake: str, pieces: int) -> None:
    assert_same_step(replace(BASE, **CHOICES[choice]), adversarial=True, fake=fake, pieces=pieces)


def test_all_rows_stay_and_none_does() -> None:
    """k = M = N - 1: s = u = sigma_min, every hop but the estimate's inner one is the identity."""
    settings = replace(BASE, k_strategy="fixed", max_solver_steps=POINTS - 1)
    piece = draw(settings, 0)
    assert piece.stays_u.all() and piece.stays_end.all()
    middle = draw(BASE, SEED)
    assert 0 < middle.stays_end.sum() < BATCH and 0 < middle.stays_u.sum() < BATCH  # as in the tests above
    _, fast = steps(settings)
    x_u = torch.randn(BATCH, 3, 8, 8)
    assert torch.equal(fast.consistency_target(x_u, piece), x_u)


@pytest.mark.parametrize("bucket", [1, 2, 4, 6])
def test_buckets_change_nothing(bucket: int) -> None:
    _, fast = steps(BASE)
    piece, x_u = draw(BASE, SEED), torch.randn(BATCH, 3, 8, 8)
    expected = fast.consistency_target(x_u, piece)
    fast.bucket = bucket
    torch.testing.assert_close(fast.consistency_target(x_u, piece), expected, rtol=1e-5, atol=1e-6)


def test_microbatch_scope_depends_on_the_split() -> None:
    """The published way: each piece has its own lambda. With one piece both scopes are the same."""
    found = {}
    for scope in ("global", "microbatch"):
        for pieces in (1, 3):
            _, fast = steps(replace(BASE, adaptive_scope=scope))
            parts = [draw(BASE, SEED, slice(i, i + BATCH // pieces)) for i in range(0, BATCH, BATCH // pieces)]
            targets = [(part, fast.consistency_target(part.x_t, part)) for part in parts]
            terms = fast.backward(targets)
            found[scope, pieces] = (float(terms["lambda_dsm"]), gradients(fast.student)["net.out_conv.weight"])
    assert found["global", 3][0] == pytest.approx(found["global", 1][0], rel=1e-5)
    assert found["microbatch", 1][0] == pytest.approx(found["global", 1][0], rel=1e-6)
    assert found["microbatch", 3][0] != pytest.approx(found["global", 1][0], rel=1e-3)
    torch.testing.assert_close(found["global", 3][1], found["global", 1][1], rtol=1e-4, atol=1e-6)


def test_a_discriminator_step_has_no_graph_of_the_generator() -> None:
    naive, fast = steps(BASE, adversarial=True)
    piece = draw(BASE, SEED)
    heads = fast.adversary.loss.discriminator  # type: ignore[union-attr]
    naive.discriminator_loss(piece).backward()
    expected = gradients(heads)
    judgement = fast.judge(piece)
    (judgement.loss.sum() / BATCH).backward()
    assert all(parameter.grad is None for parameter in fast.student.parameters())
    assert not fast.fake(piece).requires_grad
    for name, gradient in gradients(heads).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
