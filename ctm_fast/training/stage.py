"""What the stages of a run have in common."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.training.config import CTMConfig, TeacherConfig


class Stage(ABC):
    """A model in training, its average, and the update that moves both.

    A step's randomness is a function of (seed, step), so :meth:`state` holds all there is to resume from.
    """

    name: str
    settings: TeacherConfig | CTMConfig
    model: CTM | EDMDenoiser
    ema: CTM | EDMDenoiser
    optimizer: torch.optim.Optimizer

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.net.out_conv.weight.device

    @abstractmethod
    def train_step(self, step: int) -> dict[str, Tensor]:
        """Make update number ``step`` (from 0) and return its figures, scalar tensors."""

    def state(self) -> dict[str, Any]:
        """References to everything that a step changes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
