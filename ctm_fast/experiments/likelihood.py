"""Likelihood of a teacher and its CTM, on the same images and random numbers."""

import numpy as np

from ctm_fast.data import ImageDataset, load_dataset
from ctm_fast.errors import DataError
from ctm_fast.evaluation.measure_likelihood import (
    ImageBits,
    Settings,
    mean_and_error,
    measure_likelihood,
    paired_difference,
)
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.trainings import Trained
from ctm_fast.experiments.variants import CTM_PLAIN, NO_DSM

SETTINGS = Settings(tolerance=1e-3, batch=100)
MOST = 100
"""Images at most."""


def investigate(lab: Lab) -> Finding:
    """Bits per dimension, and the bound beside it, for teacher, CTM, and a CTM whose score was not trained."""
    data, split = held_out(lab)
    chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(len(data.images))[: min(MOST, lab.count)])
    kinds = ("teacher", CTM_PLAIN.name, NO_DSM.name)
    bits: dict[str, list[ImageBits]] = {kind: [] for kind in kinds}
    for seed in lab.seeds:
        models = (
            lab.trainings.teacher(seed),
            lab.trainings.student(CTM_PLAIN, seed),
            lab.trainings.student(NO_DSM, seed),
        )
        for kind, trained in zip(kinds, models, strict=True):
            bits[kind].append(_measure(lab, trained, data, chosen))
    rows = [["seed, model", "bits/dim", "bound, bits/dim", "minus the teacher's", "evaluations"]]
    for number, seed in enumerate(lab.seeds):
        for kind in kinds:
            found = bits[kind][number]
            difference = "" if kind == "teacher" else _text(paired_difference(found, bits["teacher"][number]))
            values = _text(mean_and_error(found.bits_per_dim)), _text(mean_and_error(found.bound))
            rows.append([f"{seed}, {kind}", *values, difference, f"{found.evaluations.mean():.0f}"])
    share = [(i + 0.5) / len(chosen) for i in range(len(chosen))]
    return Finding(
        {"seed, model": rows},
        Plot(
            {kind: (share, np.sort(bits[kind][0].bits_per_dim).tolist()) for kind in kinds},
            f"likelihood of each image, seed {lab.seeds[0]}, in order",
            "share of the images",
            "bits per dimension",
            log_y=False,
        ),
        [_against(bits, CTM_PLAIN.name), _against(bits, NO_DSM.name)],
        [
            f"{len(chosen)} {split}, uniform dequantisation, the ODE from sigma_min to sigma_max with "
            f"tolerance {SETTINGS.tolerance:g}, {SETTINGS.probe_count} probe an image (seed {SETTINGS.seed}), "
            f"{SETTINGS.draws} draws of the bound; errors are over images. The bound is of the reverse SDE's density, "
            "which is the ODE's only where the score is exact: it may lie below the ODE's bits. All models see the "
            "same images, noise and probes: the differences are paired.",
        ],
        {
            "seeds": list(lab.seeds),
            "index": chosen.tolist(),
            "split": split,
            "bits_per_dim": {kind: [each.bits_per_dim.tolist() for each in found] for kind, found in bits.items()},
            "bound": {kind: [each.bound.tolist() for each in found] for kind, found in bits.items()},
        },
    )


def held_out(lab: Lab) -> tuple[ImageDataset, str]:
    """The data's test split and what it is called; where there is none, what was trained on, and that in words."""
    base = lab.trainings.base
    try:
        found = load_dataset(
            base.data.source,
            resolution=base.network.img_resolution,
            channels=base.network.img_channels,
            labels=base.data.conditional,
            split="test",
        )
    except DataError:
        return lab.trainings.dataset, "of the images that were trained on (the data have no test split)"
    return found, "images of the test split"


def _measure(lab: Lab, trained: Trained, data: ImageDataset, chosen: np.ndarray) -> ImageBits:
    return measure_likelihood(
        trained.model.denoise,
        data.images[chosen],
        None if data.labels is None else data.labels[chosen],
        chosen,
        lab.trainings.base.levels,
        SETTINGS,
        device=lab.device,
    )


def _text(value: tuple[float, float]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def _against(bits: dict[str, list[ImageBits]], kind: str) -> str:
    differences = [paired_difference(one, other) for one, other in zip(bits[kind], bits["teacher"], strict=True)]
    told = ", ".join(_text(difference) for difference in differences)
    higher = all(mean > 2 * error for mean, error in differences)
    lower = all(-mean > 2 * error for mean, error in differences)
    word = "more in every seed" if higher else "less in every seed" if lower else "not told apart in every seed"
    return f"{kind} minus its teacher, bits per dimension, seed by seed: {told}: {word} (two standard errors)."


EXPERIMENT = Experiment(
    "Likelihood",
    "CTM (arXiv 2310.02279) keeps its score through DSM, and with it a likelihood about as good as its teacher's.",
    investigate,
    variants=(CTM_PLAIN, NO_DSM),
    plus_minus="one standard error over the images",
)
