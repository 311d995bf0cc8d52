"""Where quality breaks as gamma and the number of steps grow: with errors that are known, and of a trained CTM."""

import math

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
WORLD_NFES = (1, 2, 4, 8, 16, 32)
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


def in_the_world(count: int, levels: Levels) -> tuple[list[list[str]], dict[str, Curve], dict[str, float]]:
    """Table, curves and distances by their row, of samples of the mixture with errors that are known."""
    world = four_corners()
    generator = torch.Generator().manual_seed(0)
    x_T = world.sample(count, generator, level=levels.sigma_max)
    truth = world.sample(count, generator, level=levels.sigma_min)
    floor = sliced_distance(truth, world.sample(count, generator, level=levels.sigma_min))
    ends = (x_T.new_full((count,), level) for level in (levels.sigma_max, levels.sigma_min))
    exact = world.jump(x_T, *ends)
    seeds = torch.arange(count)

    def noise(i: int, x: Tensor) -> Tensor:
        return philox_normal(seeds, i, world.shape, stream=Stream.RENOISE).to(x.dtype)

    rows = [["error, γ, NFE", "sliced Wasserstein", "off the exact ODE, rms"]]
    curves: dict[str, Curve] = {}
    distances: dict[str, float] = {}
    for error in ERRORS:
        jump = FaultyJump(world, error)
        for gamma in GAMMAS:
            found = []
            for nfe in WORLD_NFES:
                sigmas = sampler_sigmas(nfe, levels).tolist()
                x = gamma_sample(jump, x_T, sigmas, gamma=gamma, jump_renoise=renoise_with(jump, noise))
                found.append(sliced_distance(x, truth))
                path = f"{float((x - exact).square().mean().sqrt()):.1e}" if gamma == 0 else ""
                name = world_row(error, gamma, nfe)
                distances[name] = found[-1]
                rows.append([name, f"{found[-1]:.4f}", path])
            curves[f"error {error:g}, γ = {gamma:g}"] = WORLD_NFES, found
    distances["floor"] = floor
    rows.append(["two sets of true samples", f"{floor:.4f}", ""])
    return rows, {name: curve for name, curve in curves.items() if not name.startswith("error 0,")}, distances


def world_row(error: float, gamma: float, nfe: int) -> str:
    """What a run in the world is called in the table."""
    return f"{error:g}, {gamma:g}, {nfe}"


def investigate(lab: Lab) -> Finding:
    """The world where errors are known, then the trained CTM."""
    rows, curves, distances = in_the_world(min(lab.count, _BATCH), lab.trainings.base.levels)
    trained = sweep(lab, GAMMAS, MODEL_NFES)
    breaks = [
        f"γ = {gamma:g}: {_break(list(nfes), list(values))}"
        for gamma, (nfes, values) in zip(GAMMAS, trained.values(), strict=True)
    ]
    last = WORLD_NFES[-1]
    exact = max(distances[world_row(0.0, gamma, nfe)] for gamma in GAMMAS for nfe in WORLD_NFES)
    growth = [
        f"error {error:g}: "
        + ", ".join(
            f"γ = {gamma:g} {distances[world_row(error, gamma, 1)]:.3f} to "
            f"{distances[world_row(error, gamma, last)]:.3f}"
            for gamma in GAMMAS
        )
        for error in ERRORS
    ]
    return Finding(
        {"In the analytic world": rows, "A trained CTM": lab.table("γ, NFE")},
        Plot(curves, "known errors, analytic mixture", "NFE", "sliced Wasserstein distance to the truth"),
        [
            f"Sliced Wasserstein distance to the truth at 1 and at {last} steps, two sets of true samples being "
            f"{distances['floor']:.3f} apart. {'; '.join(growth)}.",
            f"Without an error, over all γ and numbers of steps, it is {exact:.3f} at most: what is above that is the "
            "jumps' error, not the sampler's.",
            f"The trained CTM, best number of steps by in-domain Frechet distance and what {MODEL_NFES[-1]} cost: "
            f"{'; '.join(breaks)}.",
        ],
        [
            f"The world: a mixture of four Gaussians in the plane (ctm_fast.analytic), whose ODE is solved to 1e-10; "
            f"{min(lab.count, _BATCH)} samples that start from its exact marginal at sigma_max. The error of a jump is "
            "(1 - s / t) times a smooth field of image and level, of the stated root mean square. The last column is "
            "pathwise, from the same start, and defined for γ = 0 alone.",
            *lab.judge.describe(),
        ],
        lab.record() | {"world": distances},
    )


def _break(nfes: list[float], values: list[float]) -> str:
    best = min(range(len(values)), key=lambda i: values[i])
    return f"{nfes[best]:g} steps ({values[best]:.2f}), then up to {values[-1]:.2f}"


EXPERIMENT = Experiment(
    "Robustness",
    "CTM (arXiv 2310.02279, Sec. 3): the error of γ-sampling adds up over jumps for γ = 1, and less so for γ = 0. Here "
    "with errors that are known, in a world whose ODE is exact, and then for a trained CTM.",
    investigate,
    variants=(CTM_PLAIN,),
)
