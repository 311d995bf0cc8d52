"""The real images that samples of a run are compared with, and how."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctm_fast.data import ImageDataset
from ctm_fast.data.order import some
from ctm_fast.diffusion.images import to_float
from ctm_fast.evaluation.class_variance import within_class_variance_ratio
from ctm_fast.evaluation.classifier import accuracy, train_classifier
from ctm_fast.evaluation.frechet import half_half_floor, pixel_frechet
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.samplers import evaluations
from ctm_fast.training.config import RunConfig
from ctm_fast.training.preview import samples

_MOST = 10_000  # real images that are compared with


@dataclass(frozen=True)
class Figures:
    """What is told of a model's samples; a figure that the data do not allow is None."""

    nfe: int
    recognised: float | None
    """The share that the classifier takes for the class asked for."""
    variance_ratio: float | None
    """Variance of the pixels within a class, over that of the real images."""
    frechet: float
    """Between the Gaussians of the pixels."""


@dataclass(frozen=True)
class Reference:
    """Real images [n, C, H, W] in [-1, 1], their labels, and a small classifier trained on them with its accuracy."""

    config: RunConfig
    images: Tensor
    labels: Tensor | None
    classifier: nn.Module | None
    accuracy: float | None

    @classmethod
    def of(cls, config: RunConfig, dataset: ImageDataset, device: torch.device) -> "Reference":
        """All of ``dataset``, or of a large one a sample by the run's seed; training the classifier takes seconds."""
        # It may be stored class by class.
        chosen = some(len(dataset.images), _MOST, config.seed).to(dataset.images.device)
        images = to_float(dataset.images[chosen]).to(device)
        if dataset.labels is None:
            return cls(config, images, None, None, None)
        labels = dataset.labels[chosen].to(device)
        trained = train_classifier(images, labels, num_classes=dataset.num_classes, seed=config.seed)
        return cls(config, images, labels, *trained)

    def figures(self, model: CTM | EDMDenoiser, *, count: int, steps: int) -> Figures:
        """Of ``count`` samples of seeds 0, 1, ..., classes in turn; nothing of ``model`` is changed, nothing drawn."""
        generated, asked = samples(model, self.config, count, steps=steps)
        images = to_float(generated)
        recognised = ratio = None
        if asked is not None and self.labels is not None and self.classifier is not None:
            recognised = accuracy(self.classifier, images, asked)
            classes = asked.unique()
            several = [
                torch.bincount(labels, minlength=int(classes[-1]) + 1)[classes] for labels in (asked, self.labels)
            ]
            if bool((torch.stack(several) >= 2).all()):
                ratio = within_class_variance_ratio(images, asked, self.images, self.labels)
        return Figures(evaluations(model, steps), recognised, ratio, pixel_frechet(images, self.images))

    def floor(self) -> float:
        """The Frechet distance between halves of the real images."""
        return half_half_floor(self.images, self.config.seed)
