"""What the stages of a run have in common."""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ctm_fast.diffusion.draws import dropout_seed
from ctm_fast.distributed import average_gradients
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.training.config import CTMConfig, RunConfig, TeacherConfig
from ctm_fast.training.ema import update_ema
from ctm_fast.training.execution import Execution


class Stage(ABC):
    """A model in training, its average, and the update that moves both.

    A step's randomness is a function of (seed, step, position in the batch), so :meth:`state` holds all there is to
    resume from.

    Args:
        model: where it starts, and its average, too.
    """

    name: str
    settings: TeacherConfig | CTMConfig
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: RunConfig,
        settings: TeacherConfig | CTMConfig,
        model: CTM | EDMDenoiser,
        execution: Execution,
    ) -> None:
        self.config = config
        self.settings = settings
        self.execution = execution
        self.model = model.to(execution.device).requires_grad_(True).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.pieces = execution.pieces(settings.batch)
        self.share = self.pieces[-1].stop - self.pieces[0].start

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.execution.device

    @abstractmethod
    def train_step(self, step: int) -> dict[str, Tensor]:
        """Make update number ``step`` (from 0) and return its figures of this rank's share, scalar tensors."""

    def seed_dropout(self, step: int, positions: slice) -> None:
        """Dropout is the one draw from torch's own generator: with this it too is a function of its step and place."""
        torch.manual_seed(dropout_seed(self.config.stage_seed(self.name), step, positions.start))

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the scale of its gradients."""
        return loss

    def update(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the model along its gradients, and its averages after it; ``figures``, for :meth:`train_step`."""
        self.apply(self.optimizer, list(self.model.parameters()), figures)
        update_ema(self.ema, self.model, self.settings.ema)
        return figures

    def apply(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], figures: dict[str, Tensor]
    ) -> None:
        """One step of ``optimizer`` along the means over ranks of the gradients, which are then forgotten."""
        average_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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
