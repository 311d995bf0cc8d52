"""Quality in one and few steps: CTM without and with its adversary, a consistency model, and the teacher's solvers."""

import dataclasses
from collections.abc import Sequence

from ctm_fast.experiments.figures import Figures, compare_seeds, spread
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.sampling import Solver, jump_samples, solver_samples
from ctm_fast.experiments.variants import CM, CTM_FURTHER, CTM_GAN, CTM_PLAIN, Variant
from ctm_fast.models import CTM
from ctm_fast.pictures import Curve

NFES = (1, 2, 4)
TEACHER_NFE = 35
STUDENTS = (CTM_PLAIN, CTM_FURTHER, CTM_GAN, CM)
_SOLVERS: tuple[tuple[Solver, tuple[int, ...]], ...] = (("Euler", (1, 2, 4, 8)), ("DPM-Solver++", (2, 4, 8)))


def investigate(lab: Lab) -> Finding:
    """Every sampler at its numbers of evaluations; a consistency model with noise drawn anew in each step (gamma 1)."""
    levels = lab.trainings.base.levels
    curves: dict[str, Curve] = {}
    for variant in STUDENTS:
        gamma = 1.0 if variant is CM else 0.0
        found = []
        for nfe in NFES:
            sets = (
                jump_samples(student(lab, variant, seed), levels, lab.count, nfe=nfe, gamma=gamma) for seed in lab.seeds
            )
            found.append(lab.measure(row(variant.name, nfe), sets))
        if variant is not CTM_FURTHER:  # it covers the CTM's
            curves[variant.name] = NFES, _means(found)
    for solver, nfes in (*_SOLVERS, ("Heun", (TEACHER_NFE,))):
        found = []
        for nfe in nfes:
            models = (lab.trainings.teacher(seed).model for seed in lab.seeds)
            sets = (solver_samples(model, levels, lab.count, solver, nfe=nfe) for model in models)
            found.append(lab.measure(row(f"teacher, {solver}", nfe), sets))
        means = _means(found)
        curves[f"teacher, {solver}"] = (nfes, means) if len(nfes) > 1 else ((1, 8), (*means, *means))
    curves[f"teacher, Heun, {TEACHER_NFE}"] = curves.pop("teacher, Heun")
    adversary = [lab.trainings.student(CTM_GAN, seed).late_mean("discriminator_accuracy") for seed in lab.seeds]
    return Finding(
        {"Samples, NFE": lab.table("sampler, NFE")},
        Plot(curves, "quality by number of network evaluations", "NFE", "in-domain Frechet distance"),
        _conclusions(lab, adversary),
        [*lab.judge.describe(), _GAN_METHOD],
        lab.record() | {"discriminator_accuracy": adversary},
    )


def student(lab: Lab, variant: Variant, seed: int) -> CTM:
    """The student of ``variant``."""
    model = lab.trainings.student(variant, seed).model
    assert isinstance(model, CTM)
    return model


def row(name: str, nfe: int) -> str:
    """What a sampler at ``nfe`` evaluations is called in the table."""
    return f"{name}, {nfe}"


_GAN_METHOD = (
    "CTM + GAN goes on from the CTM for half as many steps at a fifth of its rate, every other one of the "
    'discriminator; "CTM, trained further" is its control, with as many updates of the student and no adversary. The '
    "adversary looks through a classifier of the same kind as the extractor's (another seed, images at 16 pixels), so "
    "that in-domain figures are on its side; recognised share and pixels are to be read beside them."
)


def _means(found: Sequence[Sequence[Figures]]) -> list[float]:
    return [spread(figures, lambda f: f.frechet).mean for figures in found]


def _conclusions(lab: Lab, adversary: Sequence[float]) -> list[str]:
    one = {variant.name: lab.frechet(row(variant.name, 1)) for variant in STUDENTS}
    few = {variant.name: lab.frechet(row(variant.name, NFES[-1])) for variant in STUDENTS}
    before, control, after = (lab.figures[row(v.name, 1)] for v in (CTM_PLAIN, CTM_FURTHER, CTM_GAN))
    accuracy = ", ".join(f"{100 * value:.0f} %" for value in adversary)
    changes = "; ".join(
        f"{key.name.replace('_', ' ')} {_mean(before, key.name):.3g}, {_mean(control, key.name):.3g}, "
        f"{_mean(after, key.name):.3g}"
        for key in dataclasses.fields(Figures)
        if key.name != "kid_error"
    )
    teacher = lab.frechet(row("teacher, Heun", TEACHER_NFE))
    euler = lab.frechet(row("teacher, Euler", 1))
    floor = lab.judge.floor["frechet"]
    return [
        f"CTM in one step against the teacher in one (Euler), in-domain Frechet distance: "
        f"{compare_seeds(one[CTM_PLAIN.name], euler)}. Against the teacher at {TEACHER_NFE} evaluations CTM's is "
        f"{one[CTM_PLAIN.name].mean / teacher.mean:.2g} times as large in the mean; the paper's CTM is at its "
        f"teacher's level or better. The teacher's is {teacher.mean:.3g}, where {floor['floor_count']} real images are "
        f"{floor['floor']:.3g} from the others.",
        f"CTM against CM in one step (the paper: CTM is lower): {compare_seeds(one[CTM_PLAIN.name], one[CM.name])}.",
        f"CTM against CM at {NFES[-1]} steps (the paper: CTM is lower): "
        f"{compare_seeds(few[CTM_PLAIN.name], few[CM.name])}.",
        f"More steps for CTM, {NFES[-1]} against 1 (the paper: lower): "
        f"{compare_seeds(few[CTM_PLAIN.name], one[CTM_PLAIN.name])}.",
        f"CTM + GAN against its control in one step (the paper: lower): "
        f"{compare_seeds(one[CTM_GAN.name], one[CTM_FURTHER.name])}.",
        f"In one step before the adversarial stage, after as many updates without and with adversary: {changes}.",
        f"The discriminator was right on {accuracy} of its logits in the last quarter of its steps; 50 % is chance, "
        "where it has learned nothing that the student could learn from.",
    ]


def _mean(figures: Sequence[Figures], key: str) -> float:
    return spread(figures, lambda f: float(getattr(f, key))).mean


EXPERIMENT = Experiment(
    "One-step and few-step quality",
    "CTM (arXiv 2310.02279) samples in one step about as well as its teacher in 35 evaluations, and better than "
    "a consistency model of the same network, data and budget; an adversary brings it past the teacher.",
    investigate,
    variants=STUDENTS,
)
