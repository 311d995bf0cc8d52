"""Where quality breaks as gamma and the number of steps grow: with errors that are known, and of a trained CTM."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, GaussianMixture
from ctm_fast.diffusion.schedule import Levels, sampler_sigmas
from ctm_fast.experiments.gamma import sweep
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.variants import CTM_PLAIN
from ctm_fast.ops import Stream, philox_normal
from ctm_fast.pictures import Curve
from ctm_fast.samplers import gamma_sample, renoise_with

GAMMAS = (0.0, 0.5, 1.0)
ERRORS = (0.0, 0.02, 0.1)
WORLD_NFES = (1, 2, 4, 8, 16)
MODEL_NFES = (1, 2, 4, 8, 16, 32)
_DATA_STD = 0.5
_DIRECTIONS = 32
_BATCH = 1000


class FaultyJump:
    """The exact jump of a world with an error like a network's in its inner part g.

        G(x, t, s) = G*(x, t, s) + (1 - s / t) error f(x, t),    f of mean square 1

    so that a jump that goes nowhere is right and one to 0 is off by ``error`` in the root mean square. f is smooth and
    depends on image and level alone: the same call makes the same error, as a network's would.
    """

    def __init__(self, world: GaussianMixture, error: float, *, seed: int = 0) -> None:
        self.world, self.error = world, error
        generator = torch.Generator().manual_seed(seed)
        n = math.prod(world.shape)
        self.waves = 2 * torch.randn(n, n, dtype=torch.float64, generator=generator)
        self.phases = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[B, C, H, W] at level s [B]."""
        exact = self.world.jump(x, t, s)
        if self.error == 0:
            return exact
        share = (1 - s.double() / t.double()).view(-1, 1)
        return exact + (self.error * share * self.field(x, t)).view(x.shape).to(x.dtype)

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """f [B, n] at level t [B]."""
        level = t.double().view(-1, 1)
        z = x.double().flatten(1) / (_DATA_STD**2 + level.square()).sqrt()
        return math.sqrt(2) * (z @ self.waves + self.phases + 3 * level.log()).sin()


def four_corners() -> GaussianMixture:
    """Four narrow Gaussians of unequal weight in the plane, of standard deviation about 0.5 as images have."""
    narrow = 0.08**2 * torch.eye(2, dtype=torch.float64)
    corners = ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5))
    return GaussianMixture(
        (0.4, 0.3, 0.2, 0.1),
        [Gaussian(torch.tensor(corner, dtype=torch.float64), narrow, (1, 1, 2)) for corner in corners],
    )


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """The mean over directions of the Wasserstein-1 distance between projections of a and b, [n, ...] each."""
    angles = math.pi * torch.arange(_DIRECTIONS, dtype=torch.float64) / _DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()])
    projected = [(points.double().flatten(1) @ directions).sort(0).values for points in (a, b)]
    return float((projected[0] - projected[1]).abs().mean())


@dataclass(frozen=True)
class Drift:
    """Of samples in the world: ``rms`` off those of exact jumps from the same noise, ``distance`` to true samples."""

    rms: float
    distance: float


def in_the_world(count: int, levels: Levels) -> tuple[dict[tuple[float, float, int], Drift], float]:
    """By error, gamma and number of steps; and how far two sets of true samples are apart.

    Exact jumps keep the world's marginals at any gamma and number of steps, so that ``rms`` bounds the Wasserstein-2
    distance to the truth, and it has no noise of sampling.
    """
    world = four_corners()
    generator = torch.Generator().manual_seed(0)
    x_T = world.sample(count, generator, level=levels.sigma_max)
    truth = world.sample(count, generator, level=levels.sigma_min)
    floor = sliced_distance(truth, world.sample(count, generator, level=levels.sigma_min))
    seeds = torch.arange(count)

    def noise(i: int, x: Tensor) -> Tensor:
        return philox_normal(seeds, i, world.shape, stream=Stream.RENOISE).to(x.dtype)

    drifts = {}
    for gamma in GAMMAS:
        for nfe in WORLD_NFES:
            sigmas = sampler_sigmas(nfe, levels).tolist()
            ends = []
            for error in ERRORS:  # the first is none
                jump = FaultyJump(world, error)
                ends.append(gamma_sample(jump, x_T, sigmas, gamma=gamma, jump_renoise=renoise_with(jump, noise)))
                rms = float((ends[-1] - ends[0]).square().mean().sqrt())
                drifts[error, gamma, nfe] = Drift(rms, sliced_distance(ends[-1], truth))
    return drifts, floor


def investigate(lab: Lab) -> Finding:
    """The world where errors are known, then the trained CTM."""
    drifts, floor = in_the_world(min(lab.count, _BATCH), lab.trainings.base.levels)
    trained = sweep(lab, GAMMAS, MODEL_NFES)
    rows = [["error, γ, NFE", "off exact jumps, rms", "sliced Wasserstein to the truth"]]
    for (error, gamma, nfe), drift in sorted(drifts.items()):
        rows.append([f"{error:g}, {gamma:g}, {nfe}", f"{drift.rms:.3g}", f"{drift.distance:.3g}"])
    rows.append(["two sets of true samples", "", f"{floor:.3g}"])
    curves: dict[str, Curve] = {
        f"error {error:g}, gamma = {gamma:g}": (WORLD_NFES, [drifts[error, gamma, nfe].rms for nfe in WORLD_NFES])
        for error in ERRORS[1:]
        for gamma in GAMMAS
    }
    last = WORLD_NFES[-1]
    growth = [
        f"error {error:g}: "
        + ", ".join(
            f"γ = {gamma:g} {drifts[error, gamma, 1].rms:.3g} to {drifts[error, gamma, last].rms:.3g}, at most "
            f"{max(drifts[error, gamma, nfe].rms for nfe in WORLD_NFES):.3g} in between"
            for gamma in GAMMAS
        )
        for error in ERRORS[1:]
    ]
    apart = [
        f"error {error:g}: " + ", ".join(f"γ = {gamma:g} {drifts[error, gamma, last].distance:.3g}" for gamma in GAMMAS)
        for error in ERRORS[1:]
    ]
    exact = max(drifts[0.0, gamma, nfe].distance for gamma in GAMMAS for nfe in WORLD_NFES)
    best = [
        f"γ = {gamma:g}: {_best(list(nfes), list(values))}"
        for gamma, (nfes, values) in zip(GAMMAS, trained.values(), strict=True)
    ]
    return Finding(
        {"In the analytic world": rows, "A trained CTM": lab.table("γ, NFE")},
        Plot(curves, "known errors, analytic mixture", "NFE", "root mean square off exact jumps"),
        [
            f"How far known errors of the jumps have moved the samples, from 1 to {last} steps, root mean square: "
            f"{'; '.join(growth)}. It is one field of errors, without a spread. In distribution less is told apart: "
            f"sliced Wasserstein distances to the truth at {last} steps are {'; '.join(apart)}, beside {floor:.3g} "
            "between two sets of true samples.",
            f"Without an error the samples are, over all γ and numbers of steps, at most {exact:.3g} from true ones in "
            f"sliced Wasserstein distance; two sets of true samples are {floor:.3g} apart.",
            "The trained CTM, best number of steps by in-domain Frechet distance, and what the most steps cost: "
            f"{'; '.join(best)}.",
        ],
        [
            "The world: a mixture of four Gaussians in the plane (ctm_fast.analytic), whose ODE is solved to 1e-10; "
            f"{min(lab.count, _BATCH)} samples that start from its exact marginal at sigma_max. The error of a jump is "
            "(1 - s / t) times a smooth field of image and level, of the stated root mean square. What it does is told "
            "by the same chain with exact jumps, from the same start and with the same noise.",
            *lab.judge.describe(),
        ],
        lab.record()
        | {
            "world": [
                {"error": error, "gamma": gamma, "nfe": nfe, "rms": drift.rms, "distance": drift.distance}
                for (error, gamma, nfe), drift in drifts.items()
            ],
            "world_floor": floor,
        },
    )


def _best(nfes: list[float], values: list[float]) -> str:
    best = min(range(len(values)), key=lambda i: values[i])
    return f"{nfes[best]:g} ({values[best]:.3g}), then {values[-1]:.3g} at {nfes[-1]:g}"


EXPERIMENT = Experiment(
    "Robustness",
    "CTM (arXiv 2310.02279): the error of γ-sampling adds up over jumps for γ = 1, and less so for γ = 0. Here "
    "with errors that are known, in a world whose ODE is exact, and then for a trained CTM.",
    investigate,
    variants=(CTM_PLAIN,),
)
