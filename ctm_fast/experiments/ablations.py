"""What each part of the training brings: teacher or self-teaching, DSM, adversary, adaptive weight."""

from ctm_fast.experiments.figures import compare_seeds, spread
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.one_step import row, student
from ctm_fast.experiments.sampling import jump_samples, solver_samples
from ctm_fast.experiments.variants import CTM_FURTHER, CTM_GAN, CTM_PLAIN, NO_DSM, Variant

SELF = Variant("CTM, self-teaching", settings={"solver": "self"})
SLOW_GAN = Variant("CTM + GAN, slower discriminator", "gan", {"discriminator_lr": 2e-4})
LIGHT_GAN = Variant("CTM + GAN, a tenth of its weight", "gan", {"gan_weight": 0.1})
CONSTANT = Variant("CTM, λ constant", settings={"adaptive": False})
VARIANTS = (CTM_PLAIN, SELF, NO_DSM, CONSTANT, CTM_FURTHER, CTM_GAN, SLOW_GAN, LIGHT_GAN)
PLOTTED = (CTM_PLAIN, SELF, NO_DSM, CONSTANT, CTM_GAN)
NFES = (1, 2, 4)
SCORE_NFE = 35


def investigate(lab: Lab) -> Finding:
    """Each variant in few jumps, and its own score followed by EDM's solver."""
    levels = lab.trainings.base.levels
    for variant in VARIANTS:
        for nfe in NFES:
            models = (student(lab, variant, seed) for seed in lab.seeds)
            lab.measure(row(variant.name, nfe), (jump_samples(m, levels, lab.count, nfe=nfe) for m in models))
        models = (student(lab, variant, seed) for seed in lab.seeds)
        sets = (solver_samples(m, levels, lab.count, "Heun", nfe=SCORE_NFE) for m in models)
        lab.measure(row(f"{variant.name}, its score", SCORE_NFE), sets)
    recognised = spread(lab.figures[row(SELF.name, 1)], lambda figures: figures.recognised).mean
    jumps = {variant.name: [lab.frechet(row(variant.name, nfe)).mean for nfe in NFES] for variant in VARIANTS}

    def against(one: Variant, other: Variant) -> str:
        jump = compare_seeds(lab.frechet(row(one.name, 1)), lab.frechet(row(other.name, 1)))
        scores = (lab.frechet(row(f"{variant.name}, its score", SCORE_NFE)) for variant in (one, other))
        return f"one jump: {jump}; its score at {SCORE_NFE} evaluations: {compare_seeds(*scores)}"

    return Finding(
        {"variant, NFE": lab.table("variant, NFE")},
        Plot(
            {variant.name.replace("λ", "lambda"): (NFES, jumps[variant.name]) for variant in PLOTTED},
            "what each part of the training brings",
            "NFE",
            "in-domain Frechet distance",
        ),
        [
            "With a teacher against self-teaching, in-domain Frechet distance (the paper: lower), "
            f"{against(CTM_PLAIN, SELF)}. Self-teaching starts from random weights and has not learned yet in as many "
            f"steps: {100 * recognised:.0f} % of its one-step samples are recognised.",
            f"With DSM against without (the paper: lower, and the score needs it), {against(CTM_PLAIN, NO_DSM)}.",
            f"λ adaptive against constant (the paper: lower), {against(CTM_PLAIN, CONSTANT)}.",
            *(
                f"{variant.name} against as many updates without (the paper: lower), {against(variant, CTM_FURTHER)}."
                for variant in (CTM_GAN, SLOW_GAN, LIGHT_GAN)
            ),
        ],
        [
            *lab.judge.describe(),
            "Self-teaching has no teacher: its student starts from random weights and takes as many steps, so that it "
            'has seen less than the others, which start from a trained network. "Its score" is EDM\'s Heun solver with '
            "the student's own denoiser g(x, σ, σ).",
        ],
        lab.record(),
    )


EXPERIMENT = Experiment(
    "Ablations",
    "CTM (arXiv 2310.02279): each of teacher, DSM, adversary and adaptive weight helps.",
    investigate,
    variants=VARIANTS,
)
