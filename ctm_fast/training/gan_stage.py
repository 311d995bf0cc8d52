"""The third stage: student and discriminator are moved in turn (arXiv 2310.02279, Sec. 4)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctm_fast.data import ImageDataset
from ctm_fast.distributed import take_first_
from ctm_fast.losses import AdversarialLoss
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import FeatureNetwork, feature_shapes
from ctm_fast.training.config import GANConfig, RunConfig
from ctm_fast.training.ctm_stage import CTMStage
from ctm_fast.training.ctm_step import Adversary
from ctm_fast.training.execution import Execution
from ctm_fast.training.features import ClassifierMaps
from ctm_fast.training.finite import FiniteGuard
from ctm_fast.training.radam import RAdam
from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Optimizer
from ctm_fast.training.work import discriminator_passes

BETAS = (0.5, 0.9)
"""Of the discriminator's RAdam (published)."""


class GANStage(CTMStage):
    """Even steps move the student by all three losses, odd ones the discriminator; both count.

    The discriminator starts afresh, from the stage's seed; its random projector is part of the state, and so are
    feature networks that were trained for the run, as another process may get others.

    Args:
        features: the frozen networks that ``settings.features`` names.
    """

    name = "gan"
    settings: GANConfig

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        execution: Execution,
        regions: Regions,
        student: CTM,
        teacher: EDMDenoiser | None,
        distance: Distance,
        features: Sequence[FeatureNetwork],
    ) -> None:
        settings = config.gan
        self.trained = nn.ModuleList(network for network in features if isinstance(network, ClassifierMaps))
        take_first_(self.trained.state_dict().values())  # two GPUs do not train the same one
        self.discriminator = ProjectedDiscriminator(
            [feature_shapes(network, config.network.img_resolution, execution.device) for network in features],
            seed=config.stage_seed(self.name),
            width=settings.discriminator_width,
            classes=config.network.label_dim if settings.conditional else 0,
            sync_batch_norm=execution.ranks.size > 1,
        ).to(execution.device)
        loss = AdversarialLoss(
            features, self.discriminator, augment=settings.augment, same_augment=settings.same_augment, r1=settings.r1
        )
        adversary = Adversary(loss, settings.gan_weight, settings.fake)
        super().__init__(config, dataset, execution, regions, student, teacher, distance, adversary=adversary)
        self.discriminator_optimizer = RAdam(self.discriminator.parameters(), settings.discriminator_lr, betas=BETAS)
        self.discriminator_guard = FiniteGuard(config.max_skipped, execution.device)

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update of the student or of the discriminator, and its figures."""
        if step < self.settings.start or step % 2 == 0:
            return self.move_student(step, adversarial=step >= self.settings.start)
        return self.move_discriminator(step)

    def move_discriminator(self, step: int) -> dict[str, Tensor]:
        """One update of the heads: their loss, and the share of logits that are right."""
        losses, accuracies = [], []
        pieces, _ = self.draw(step)
        for piece, positions in zip(pieces, self.pieces, strict=True):
            self.seed_dropout(step, positions)
            judgement = self.step.judge(piece)
            self.scale(judgement.loss.sum() / self.share).backward()
            losses.append(judgement.loss.detach())
            accuracies.append(judgement.accuracy() * (len(piece.x0) / self.share))
        figures = {
            "discriminator_loss": torch.cat(losses).mean(),
            "discriminator_accuracy": torch.stack(accuracies).sum(),
        }
        self.passes += discriminator_passes(self.step, pieces)
        heads = list(self.discriminator.parameters())
        skipped = self.apply(self.discriminator_optimizer, heads, self.discriminator_guard, step, figures)
        return {**figures, "skipped": skipped}

    def updates(self, step: int) -> int:
        """How often the student has been moved after step number ``step``."""
        start = self.settings.start
        return step + 1 if step < start else start + step // 2 - (start - 1) // 2

    def optimizers(self) -> Iterator[tuple[str, nn.Module, Optimizer]]:
        """Of the student, and of the discriminator."""
        yield from super().optimizers()
        yield "discriminator_optimizer", self.discriminator, self.discriminator_optimizer

    def guards(self) -> Iterator[FiniteGuard]:
        """Of the student, and of the discriminator."""
        yield from (self.guard, self.discriminator_guard)

    def state(self) -> dict[str, Any]:
        """With the discriminator, its projector, and its optimizer."""
        return {
            **super().state(),
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "discriminator_guard": self.discriminator_guard.state_dict(),
            "features": self.trained.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        super().load_state(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.discriminator_guard.load_state_dict(state["discriminator_guard"])
        self.trained.load_state_dict(state["features"])
