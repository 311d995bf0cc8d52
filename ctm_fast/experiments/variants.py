"""What the experiments train: configurations made from a preset by a table of changes.

A run is found again by its configuration, so each holds what matters to it and nothing else: all variants of a seed
share one teacher, and all experiments share the variants that they have in common.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ctm_fast.models import NetworkConfig
from ctm_fast.training import RunConfig
from ctm_fast.training.config import CTMConfig, GANConfig, TeacherConfig

GAN_SHARE = 0.5
"""Steps of the adversarial stage, over those of the CTM before it."""
GAN_RATE = 0.2
"""Its learning rate, over that of the CTM before it."""


@dataclass(frozen=True)
class Variant:
    """A student: ``settings`` are keys of its stage that differ from the preset's.

    Args:
        name: what it is called in tables.
        stage: ``ctm``, or what goes on from the plain CTM: ``gan``, or ``further`` for its control, as many updates
            without an adversary.
    """

    name: str
    stage: Literal["ctm", "gan", "further"] = "ctm"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """A network of another width (``model_channels``) and depth (``num_blocks``) than the preset's."""

    channels: int
    blocks: int

    def of(self, network: NetworkConfig) -> NetworkConfig:
        """``network`` in this size."""
        return replace(network, model_channels=self.channels, num_blocks=self.blocks)


CTM_PLAIN = Variant("CTM")
CM = Variant("CM", settings={"s_strategy": "smallest", "target_inner": "target-sg", "dsm_weight": 0.0})
NO_DSM = Variant("CTM without DSM", settings={"dsm_weight": 0.0})
CTM_GAN = Variant("CTM + GAN", "gan")
CTM_FURTHER = Variant("CTM, trained further", "further")


def scaled(base: RunConfig, scale: float) -> RunConfig:
    """``base`` at ``scale`` times its steps; averages are as much shorter, so that they forget the same share."""

    def shorter(stage: Any) -> Any:
        return replace(stage, steps=max(1, round(scale * stage.steps)), ema=stage.ema ** (1 / scale), emas=())

    return replace(base, teacher=shorter(base.teacher), ctm=shorter(base.ctm), gan=GANConfig())


def teacher_run(base: RunConfig, seed: int) -> RunConfig:
    """The stage ``teacher`` alone, whatever is to be made from it."""
    return replace(base, seed=seed, stages=("teacher",), ctm=CTMConfig(), gan=GANConfig())


def student_run(base: RunConfig, seed: int, variant: Variant) -> RunConfig:
    """The stage of ``variant`` alone."""
    plain = replace(base, seed=seed, teacher=TeacherConfig(), gan=GANConfig())
    if variant.stage == "ctm":
        return replace(plain, stages=("ctm",), ctm=replace(base.ctm, **variant.settings))
    updates = max(1, round(GAN_SHARE * base.ctm.steps / 2))
    going_on = replace(base.ctm, steps=updates, lr=GAN_RATE * base.ctm.lr)
    if variant.stage == "further":
        return replace(plain, stages=("ctm",), ctm=replace(going_on, **variant.settings))
    settings = {key.name: getattr(going_on, key.name) for key in fields(CTMConfig)}
    settings |= {"steps": 2 * updates, "features": ("indomain",), "features_size": max(16, base.network.img_resolution)}
    settings |= {"discriminator_width": 16}
    return replace(plain, stages=("gan",), ctm=CTMConfig(), gan=GANConfig(**settings | variant.settings))
