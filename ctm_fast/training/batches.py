"""The batch of a training step as a function of (seed, step, position): images, labels and noise on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctm_fast.data import ImageDataset, batch_indices
from ctm_fast.diffusion.draws import draw_flips, draw_labelled
from ctm_fast.diffusion.images import to_float
from ctm_fast.ops import Stream, philox_normal
from ctm_fast.training.config import RunConfig


@dataclass(frozen=True)
class Batches:
    """Endless seeded batches of a data set that lies decoded on the device.

    ``batch`` is that of all ranks and micro-batches together, and a rank or micro-batch takes ``positions``, a
    slice(start, stop) of it. ``seed`` is that of a stage, so that no two stages see the same noise; all of a sample
    depends on (seed, step, position in the global batch) alone. With ``label_dropout`` that is also whether its label
    is dropped, for every network that is asked about it: a student's answer without one is its teacher's without one.
    """

    dataset: ImageDataset
    batch: int
    seed: int
    device: torch.device
    conditional: bool
    flip: bool
    label_dim: int = 0
    label_dropout: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, stage: str, batch: int, dataset: ImageDataset, device: torch.device) -> "Batches":
        """Those of ``stage`` of a run, on its own seed."""
        network, data = config.network, config.data
        seed = config.stage_seed(stage)
        return cls(dataset, batch, seed, device, data.conditional, data.flip, network.label_dim, network.label_dropout)

    def at(self, step: int, positions: slice) -> tuple[Tensor, Tensor | None]:
        """x0 [B, C, H, W] float32 in [-1, 1], and labels or None, of B = stop - start positions.

        Labels are [B] int64; with ``label_dropout`` one-hot [B, label_dim] float32, zeros where dropped.
        """
        self._check(positions)
        indices = batch_indices(len(self.dataset.images), self.batch, self.seed, step)
        index = self.tensor(indices[positions].numpy())
        x0 = to_float(self.dataset.images[index])
        if self.flip:
            flips = self.tensor(draw_flips(positions, seed=self.seed, step=step))
            x0 = torch.where(flips.view(-1, 1, 1, 1), x0.flip(3), x0)
        labels = self.dataset.labels[index] if self.conditional and self.dataset.labels is not None else None
        if labels is not None and self.label_dropout:
            kept = self.tensor(draw_labelled(positions, seed=self.seed, step=step, dropout=self.label_dropout))
            labels = functional.one_hot(labels, self.label_dim).float() * kept.unsqueeze(1)
        return x0, labels

    def noise(self, step: int, like: Tensor, stream: Stream, positions: slice) -> Tensor:
        """N(0, I) of the shape of ``like``, the images at ``positions``."""
        return philox_normal(self.seeds(positions), step, like.shape[1:], stream=stream)

    def seeds(self, positions: slice) -> Tensor:
        """[B] int64: one for each of ``positions``, of this stage alone."""
        self._check(positions)
        return torch.arange(positions.start, positions.stop, device=self.device) + (self.seed << 32)

    def tensor(self, values: NDArray[np.generic]) -> Tensor:
        """A host array on the device; float64 becomes float32. No step waits for a GPU: the copy is queued."""
        tensor = torch.from_numpy(values)
        if tensor.is_floating_point():
            tensor = tensor.float()
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _check(self, positions: slice) -> None:
        """A slice past the batch would be cut short in silence."""
        if positions.step is not None or not 0 <= positions.start <= positions.stop <= self.batch:
            raise ValueError(
                f"positions: expected slice(start, stop) with 0 <= start <= stop <= {self.batch}, got {positions}"
            )
