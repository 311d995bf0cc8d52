"""gamma-sampling: how much noise is drawn anew, against the number of steps."""

from ctm_fast.experiments.figures import compare_seeds
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.one_step import row, student
from ctm_fast.experiments.sampling import jump_samples
from ctm_fast.experiments.variants import CTM_PLAIN
from ctm_fast.pictures import Curve

GAMMAS = (0.0, 0.5, 0.9, 1.0)
NFES = (1, 2, 4, 8, 16)


def investigate(lab: Lab) -> Finding:
    """One grid of gamma and steps; at one step gamma has no part."""
    curves = sweep(lab, GAMMAS, NFES)
    last = NFES[-1]
    zero, one = (lab.frechet(row(_name(gamma), last)) for gamma in (0.0, 1.0))
    first = lab.frechet(row(_name(0.0), 1))
    best = min(GAMMAS, key=lambda gamma: lab.frechet(row(_name(gamma), last)).mean)
    return Finding(
        {"γ, NFE": lab.table("γ, NFE")},
        Plot(curves, "gamma-sampling of a CTM", "NFE", "in-domain Frechet distance"),
        [
            f"γ = 0 against γ = 1 at {last} steps (the paper: γ = 0 is lower, γ = 1 gets worse with more steps): "
            f"{compare_seeds(zero, one)}. The lowest there is γ = {best:g}.",
            f"γ = 0 at {last} steps against one step (the paper: lower): {compare_seeds(zero, first)}.",
            f"γ = 0 at 2 steps against one: {compare_seeds(lab.frechet(row(_name(0.0), 2)), first)}.",
            f"γ = 1 at one step against {last} steps (the paper: lower): {compare_seeds(first, one)}.",
        ],
        lab.judge.describe(),
        lab.record(),
    )


def sweep(lab: Lab, gammas: tuple[float, ...], nfes: tuple[int, ...]) -> dict[str, Curve]:
    """Figures of the plain CTM for each gamma and number of steps, as rows of the lab; in-domain Frechet distances.

    The curves' names are in letters that the font of pictures has.
    """
    levels = lab.trainings.base.levels
    curves: dict[str, Curve] = {}
    for gamma in gammas:
        for nfe in nfes:
            name = row(_name(gamma), nfe)
            if nfe == 1 and gamma != gammas[0]:
                lab.figures[name] = lab.figures[row(_name(gammas[0]), 1)]
                continue
            models = (student(lab, CTM_PLAIN, seed) for seed in lab.seeds)
            lab.measure(name, (jump_samples(model, levels, lab.count, nfe=nfe, gamma=gamma) for model in models))
        curves[f"gamma = {gamma:g}"] = nfes, [lab.frechet(row(_name(gamma), nfe)).mean for nfe in nfes]
    return curves


def _name(gamma: float) -> str:
    return f"γ = {gamma:g}"


EXPERIMENT = Experiment(
    "γ against the number of steps",
    "CTM (arXiv 2310.02279): with γ = 0 more steps help, with γ = 1, consistency-model multistep "
    "sampling, errors add up and more steps hurt.",
    investigate,
    variants=(CTM_PLAIN,),
)
