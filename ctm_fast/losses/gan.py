"""The adversarial loss: hinge on the logits of a projected discriminator, both sides augmented (CTM, Sec. 4)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ctm_fast.losses.augment import diff_augment, draw_augment
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import FeatureNetwork, freeze
from ctm_fast.models.features.network import rgb

AUGMENT_STREAM = 0x100
"""The first of the streams of ``ops.philox_words`` that augmentation draws from: two for each feature network."""


def generator_hinge(fake: Tensor) -> Tensor:
    """[B]: minus the mean of a generated sample's logits [B, N]."""
    return -fake.float().mean(1)


def discriminator_hinge(fake: Tensor, real: Tensor) -> Tensor:
    """[B]: mean max(0, 1 + fake) + mean max(0, 1 - real) over logits [B, N]; 2 where all are 0."""
    return F.relu(1 + fake.float()).mean(1) + F.relu(1 - real.float()).mean(1)


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """[B]: half the squared norm of the gradient of a sample's mean logit to its image (arXiv 1801.04406, Eq. 9).

    Differentiable in what ``logits`` [B, N] depend on; ``images`` [B, C, H, W] need a gradient. Batch norm makes a
    sample's logits depend on the others' images: the gradient is that of the sum over the batch.
    """
    (gradient,) = torch.autograd.grad(logits.float().mean(1).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1) / 2


@dataclass(frozen=True)
class Judgement:
    """What a discriminator made of a batch: ``loss`` [B], with its gradient; the logits [B, N] without."""

    loss: Tensor
    fake: Tensor
    real: Tensor

    def accuracy(self) -> Tensor:
        """The fraction of logits whose sign is right, half of it from either side."""
        return ((self.fake < 0).float().mean() + (self.real > 0).float().mean()) / 2


class AdversarialLoss:
    """Images [B, C, H, W] in [-1, 1] -> augmented -> each feature network -> discriminator -> hinge, per sample.

    Every feature network sees its own draws, and so do real and generated images unless ``same_augment``: functions of
    (seed, step, network, side) of each sample, so a batch may be split over ranks and micro-batches. Grey images are
    repeated to RGB. Feature networks that are modules are frozen here. Ranks average the gradients of
    ``discriminator.parameters()`` themselves.

    Args:
        features: see :data:`ctm_fast.models.features.FeatureNetwork`; one for each network of the discriminator.
        discriminator: the trained heads.
        augment: DiffAugment, see :mod:`ctm_fast.losses.augment`.
        same_augment: real and generated images share their draws.
        r1: weight of :func:`r1_penalty` on real images, 0 without.
    """

    def __init__(
        self,
        features: Sequence[FeatureNetwork],
        discriminator: ProjectedDiscriminator,
        *,
        augment: bool = True,
        same_augment: bool = False,
        r1: float = 0.0,
    ) -> None:
        if len(features) != len(discriminator.branches):
            raise ValueError(f"features: expected {len(discriminator.branches)} networks, got {len(features)}")
        for network in features:
            if isinstance(network, nn.Module):
                freeze(network)
        self.features = tuple(features)
        self.discriminator = discriminator
        self.augment, self.same_augment, self.r1 = augment, same_augment, r1

    def logits(self, images: Tensor, labels: Tensor | None, *, seeds: Tensor, step: int, real: bool) -> Tensor:
        """[B, N], augmented with the draws of ``real`` or of generated images; seeds [B] int64, one for each sample."""
        maps = []
        for index, network in enumerate(self.features):
            shown = images
            if self.augment:
                stream = AUGMENT_STREAM + 2 * index + (real and not self.same_augment)
                shown = diff_augment(images, draw_augment(seeds, step, *images.shape[2:], stream=stream))
            maps.append(network(rgb(shown)))
        logits: Tensor = self.discriminator(maps, labels)
        return logits

    def generator(self, fake: Tensor, labels: Tensor | None, *, seeds: Tensor, step: int) -> Tensor:
        """L_G [B] of generated images, with its gradient to them alone: the heads' is not computed."""
        with _frozen(self.discriminator):
            return generator_hinge(self.logits(fake, labels, seeds=seeds, step=step, real=False))

    def judge(self, fake: Tensor, real: Tensor, labels: Tensor | None, *, seeds: Tensor, step: int) -> Judgement:
        """L_D [B], with its gradient to the heads alone; ``fake`` and ``real`` are two batches of the same labels.

        Each side goes through the heads by itself, as batch norm's statistics are of one side; the spectrally
        normalised weights are computed once for both.
        """
        fake, real = fake.detach(), real.detach().requires_grad_(self.r1 > 0)
        with parametrize.cached():
            fake_logits = self.logits(fake, labels, seeds=seeds, step=step, real=False)
            real_logits = self.logits(real, labels, seeds=seeds, step=step, real=True)
        loss = discriminator_hinge(fake_logits, real_logits)
        if self.r1:
            loss = loss + self.r1 * r1_penalty(real_logits, real)
        return Judgement(loss, fake_logits.detach(), real_logits.detach())


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients inside."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
