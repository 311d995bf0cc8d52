"""The presets: networks of the published sizes, and the published values in one table."""

from dataclasses import replace

import pytest
import torch

from ctm_fast.models import build_network
from ctm_fast.training import PRESETS, preset
from ctm_fast.training.averages import parse_average
from ctm_fast.training.config import GANConfig

COUNTS = {
    "cifar10-cond": (55_734_147, 60_396_675),
    "cifar10-uncond": (55_732_739, 60_395_267),
    "imagenet64": (295_899_267, 324_100_611),
    "fashion-mnist-32": (31_362_913, 33_987_361),
    "fashion-mnist-16": (749_089, 835_873),
    "digits": (715_553, 802_337),
    "digits-gan": (715_553, 802_337),
    "digits-cm": (715_553, 802_337),
}


@pytest.mark.parametrize("name", PRESETS)
def test_networks(name: str) -> None:
    """Of teacher and student. The published ones have the published numbers of parameters."""
    counts = []
    for s_branch in (False, True):
        with torch.device("meta"):
            net = build_network(preset(name).network, s_branch=s_branch)
        counts.append(sum(parameter.numel() for parameter in net.parameters()))
    assert tuple(counts) == COUNTS[name]


CIFAR10_EDM, IMAGENET_EDM = (512, 1e-3, 200e6, 0.5e6), (4096, 1e-4, 2500e6, 50e6)
PUBLISHED = [
    # preset            teacher: batch, lr, images, half-life
    #                                  stage  batch   lr  target   N   M  dropout  W        further averages
    ("cifar10-cond",   CIFAR10_EDM,  "ctm",  256, 4e-4, 0.999,  18, 17, 0.13, "output", (0.9999,)),
    ("cifar10-cond",   CIFAR10_EDM,  "gan",  528, 4e-4, 0.999,  18, 17, 0.13, "output", (0.9999,)),
    ("cifar10-uncond", CIFAR10_EDM,  "ctm",  384, 4e-4, 0.999,  18, 17, 0.13, "output", (0.9999,)),
    ("cifar10-uncond", CIFAR10_EDM,  "gan",  528, 4e-4, 0.9999, 18, 17, 0.13, "output", (0.999,)),
    ("imagenet64",     IMAGENET_EDM, "ctm", 1440, 4e-4, 0.999,  40, 39, 0.0,  "block",  (0.9999, 0.9999432189950708)),
    ("imagenet64",     IMAGENET_EDM, "gan", 4224, 8e-6, 0.999,  40, 20, 0.0,  "block",  (0.9999, 0.9999432189950708)),
]  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}-{row[2]}")
def test_published_values(row: tuple[object, ...]) -> None:
    name, (batch, lr, images, half_life), stage, *values, emas = row  # type: ignore[misc]
    config = preset(name)
    teacher, student = config.teacher, config.of_student(stage)
    assert (teacher.batch, teacher.lr) == (batch, lr)
    assert abs(teacher.steps * batch - images) <= batch
    assert teacher.ema ** (half_life / batch) == pytest.approx(0.5, rel=1e-9)
    assert (teacher.p_mean, teacher.p_std) == (-1.2, 1.2)
    got = [student.batch, student.lr, student.ema, student.points, student.max_solver_steps]
    assert [*got, config.network.dropout, student.adaptive_layer] == values
    assert [parse_average(average).weight(1) for average in student.emas] == pytest.approx([1 - e for e in emas], 1e-7)
    assert (student.distance, student.distance_size, student.k_strategy, student.s_strategy) == (
        "lpips", 224, "weighted", "uniform",
    )  # fmt: skip
    assert (student.dsm_law, student.uniform_to, student.adaptive, student.lr_decay) == ("half-lognormal", 0.7, True, 0)
    assert vars(config.levels) == {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0} and config.sigma_data == 0.5
    assert config.stages == ("teacher", "ctm", "gan") and config.data.flip
    if isinstance(student, GANConfig):
        assert (student.features, student.features_size) == (("efflite0", "deit"), 224)
        assert (student.start, student.gan_weight, student.discriminator_lr, student.r1) == (0, 1.0, 2e-3, 0.0)
        assert (student.augment, student.same_augment, student.conditional) == (True, False, False)
        assert (student.fake, student.discriminator_width) == ("estimate", 64)


def test_precision_is_named() -> None:
    """bf16 where it is meant for GPUs, also of the solver; nowhere else."""
    for name, config in PRESETS.items():
        gpu = name.startswith(("cifar10", "imagenet64")) or name == "fashion-mnist-32"
        assert config.precision == ("bf16" if gpu else "auto")
        solver = {config.of_student(stage).solver_precision for stage in config.stages[1:]}
        assert solver == {"bf16" if gpu else "fp32"}


def test_consistency_distillation_is_the_same_but_for_what_makes_it_so() -> None:
    cm, ctm = preset("digits-cm"), preset("digits")
    settings = replace(ctm.ctm, s_strategy="smallest", target_inner="target-sg", dsm_weight=0.0)
    assert replace(ctm, preset="digits-cm", ctm=settings, gan=cm.gan) == cm
