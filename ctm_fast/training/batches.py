"""The batch of a training step as a function of (seed, step): images, labels and noise on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctm_fast.data import ImageDataset, batch_indices
from ctm_fast.diffusion.draws import Purpose, generator
from ctm_fast.diffusion.images import to_float
from ctm_fast.ops import Stream, philox_normal
from ctm_fast.training.config import RunConfig


@dataclass(frozen=True)
class Batches:
    """Endless seeded batches of a data set that lies decoded on the device.

    ``seed`` is that of a stage, so that no two stages see the same noise; the noise of a sample depends on
    (seed, step, position in the batch) alone.
    """

    dataset: ImageDataset
    batch: int
    seed: int
    device: torch.device
    conditional: bool
    flip: bool

    @classmethod
    def of(cls, config: RunConfig, stage: str, batch: int, dataset: ImageDataset, device: torch.device) -> "Batches":
        """Those of ``stage`` of a run, on its own seed."""
        return cls(dataset, batch, config.stage_seed(stage), device, config.data.conditional, config.data.flip)

    def at(self, step: int) -> tuple[Tensor, Tensor | None]:
        """x0 [B, C, H, W] float32 in [-1, 1], labels [B] int64 or None."""
        index = self.tensor(batch_indices(len(self.dataset.images), self.batch, self.seed, step).numpy())
        x0 = to_float(self.dataset.images[index])
        if self.flip:
            flips = generator(self.seed, step, Purpose.FLIPS).random(self.batch) < 0.5
            x0 = torch.where(self.tensor(flips).view(-1, 1, 1, 1), x0.flip(3), x0)
        labels = self.dataset.labels[index] if self.conditional and self.dataset.labels is not None else None
        return x0, labels

    def noise(self, step: int, like: Tensor, stream: Stream) -> Tensor:
        """N(0, I) of the shape of ``like``."""
        seeds = torch.arange(self.batch, device=self.device) + (self.seed << 32)
        return philox_normal(seeds, step, like.shape[1:], stream=stream)

    def tensor(self, values: NDArray[np.generic]) -> Tensor:
        """A host array on the device; float64 becomes float32. No step waits for a GPU: the copy is queued."""
        tensor = torch.from_numpy(values)
        if tensor.is_floating_point():
            tensor = tensor.float()
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
