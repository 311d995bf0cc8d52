"""What the stages of a run have in common."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctm_fast.diffusion.draws import dropout_seed
from ctm_fast.distributed import average_gradients
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.training.averages import Averages, lerp
from ctm_fast.training.config import CTMConfig, RunConfig, TeacherConfig
from ctm_fast.training.execution import Execution
from ctm_fast.training.finite import FiniteGuard
from ctm_fast.training.memory_order import local
from ctm_fast.training.placement import placement
from ctm_fast.training.precision import LossScale, compute_dtype, resolve
from ctm_fast.training.radam import RAdam

Optimizer = RAdam | torch.optim.Adam


class Stage(ABC):
    """A model in training, its averages, and the update that moves them.

    A step's randomness is a function of (seed, step, position in the batch), so :meth:`state` holds all there is to
    resume from. A step that is not finite changes nothing; nothing here waits for the device.

    Args:
        model: where it starts, and its averages, too.
    """

    name: str
    settings: TeacherConfig | CTMConfig
    optimizer: Optimizer

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
        precision = resolve(config.precision, execution.device)
        model.dtype = compute_dtype(precision)
        self.model = model.to(execution.device).requires_grad_(True).train()
        self.model.net.embedding.label_dropout = 0.0  # labels come from Batches, the same to all networks of a step
        if execution.checkpoint_blocks:
            self.model.net.checkpoint_blocks()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.averages = Averages(self.model, settings.emas)
        self.placement = placement(execution)
        for each in (self.model, self.ema, *map(self.averages.model_of, self.averages.names)):
            self.placement.place(each.net)
        self.pieces = execution.pieces(settings.batch)
        self.share = self.pieces[-1].stop - self.pieces[0].start
        self.passes = 0
        """Forward passes of the network that this rank has made, times images; a backward one counts as two."""
        self.guard = FiniteGuard(config.max_skipped, execution.device)
        self.loss_scale = LossScale(execution.device) if precision == "fp16" else None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.execution.device

    @abstractmethod
    def train_step(self, step: int) -> dict[str, Tensor]:
        """Make update number ``step`` (from 0) and return its figures of this rank's share, scalar tensors.

        ``skipped`` is 1 where the step was not finite, and void, else 0.
        """

    def updates(self, step: int) -> int:
        """How often the model has been moved after step number ``step``."""
        return step + 1

    def optimizers(self) -> Iterator[tuple[str, nn.Module, Optimizer]]:
        """The name in :meth:`state` of each optimizer, what it moves, and itself."""
        yield "optimizer", self.model, self.optimizer

    def gather(self, model: CTM | EDMDenoiser) -> CTM | EDMDenoiser | None:
        """The student or one of its averages in one piece on the first rank, at least; every rank calls."""
        return self.placement.gather(model, self.config.network)

    def guards(self) -> Iterator[FiniteGuard]:
        """What has the record of steps that were void."""
        yield self.guard

    def seed_dropout(self, step: int, positions: slice) -> None:
        """Dropout is the one draw from torch's own generator: with this it too is a function of its step and place."""
        torch.manual_seed(self.dropout_seed(step, positions))

    def dropout_seed(self, step: int, positions: slice) -> int:
        """Of torch's generator for the samples at ``positions``, below 2^32."""
        return dropout_seed(self.config.stage_seed(self.name), step, positions.start)

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the scale of its gradients."""
        return loss if self.loss_scale is None else self.loss_scale.scale(loss)

    def update(self, step: int, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the model along its gradients and its averages after it; the figures of step number ``step``."""
        skipped = self.apply(self.optimizer, list(self.model.parameters()), self.guard, step, figures)
        lerp(self.ema, self.model, 1 - self.settings.ema, found_inf=skipped)
        self.averages.update(self.updates(step), found_inf=skipped)
        return {**figures, "skipped": skipped}

    def apply(
        self,
        optimizer: Optimizer,
        parameters: list[nn.Parameter],
        guard: FiniteGuard,
        step: int,
        figures: dict[str, Tensor],
    ) -> Tensor:
        """One step of ``optimizer`` along the means over ranks of the gradients, which are then forgotten.

        Returns 1 if figures or gradients were not finite, and nothing was changed, else 0.
        """
        average_gradients(self.placement.to_average(parameters))
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        losses = {name: value for name, value in figures.items() if name.endswith("loss")}
        skipped = guard.check(step, losses, torch.nn.utils.get_total_norm(gradients))
        optimizer.found_inf = skipped  # type: ignore[union-attr]  # as torch.amp.GradScaler tells fused optimizers
        if self.loss_scale is not None:
            optimizer.grad_scale = self.loss_scale.value  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        return skipped

    def state(self) -> dict[str, Any]:
        """References to everything that a step changes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state_dict(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.averages.load_state_dict(state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
