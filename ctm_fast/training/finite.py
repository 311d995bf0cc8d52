"""Steps that are not finite: voided without waiting for the device, counted, and after some in a row the end."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctm_fast.distributed import all_sum
from ctm_fast.errors import ConfigError, DivergedError

GRADIENTS = "gradients"
"""What a norm that is not finite is called beside the losses."""


class FiniteGuard:
    """Decides on the device whether a step counts, and keeps the record there until it is asked for.

        found_inf = guard.check(step, {"ctm_loss": ..., "dsm_loss": ...}, gradient_norm)
        optimizer.found_inf = found_inf           # RAdam of this package, or a fused optimizer of PyTorch
        optimizer.step()
        averages.update(step, found_inf=found_inf)
        skipped = guard.gather("ctm")             # now and then: waits for the device

    With several ranks a step counts on all of them or on none: each calls :meth:`check`, and one flag voids the step.

    Args:
        limit: voided steps in a row that end the run.
        device: where losses and gradients are.

    Raises ConfigError unless ``limit`` is positive.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        if limit < 1:
            raise ConfigError(f"limit of skipped steps: expected a number from 1 on, got {limit}")
        self.limit = limit
        self._names: tuple[str, ...] = ()
        self._skipped, self._row, self._first = torch.zeros((3,), dtype=torch.int64, device=device).unbind()
        self._over = torch.zeros((), dtype=torch.bool, device=device)
        self._blamed = torch.zeros((0,), dtype=torch.bool, device=device)

    @torch.no_grad()
    def check(self, step: int, losses: Mapping[str, Tensor], gradient_norm: Tensor) -> Tensor:
        """1.0 if a loss or the norm of the gradients is not finite, else 0.0: float32 scalar on the device.

        ``losses`` are of any shapes, under the same names at every step; ``step`` is what an error will name.
        """
        found = {**losses, GRADIENTS: gradient_norm}
        bad = torch.stack([value.detach().isfinite().logical_not().any() for value in found.values()])
        bad = all_sum(bad) > 0
        if self._names != tuple(found):
            self._names, self._blamed = tuple(found), torch.zeros_like(bad)
        skip = bad.any()
        self._skipped += skip
        self._row.add_(1).mul_(skip)
        begins = (self._row == 1) & ~self._over
        self._first.masked_fill_(begins, step)
        self._blamed = torch.where(begins, bad, self._blamed)
        self._over |= self._row >= self.limit
        return skip.float()

    def gather(self, stage: str) -> int:
        """How many steps have been voided since the start of ``stage``; waits for the device.

        Raises DivergedError if there were ``limit`` in a row, naming what was not finite and the first of them.
        """
        if bool(self._over):
            names = [name for name, blamed in zip(self._names, self._blamed.tolist(), strict=True) if blamed]
            raise DivergedError(
                f"{stage}: expected finite losses and gradients, got {' and '.join(names)} that are not from step "
                f"{int(self._first)} on, {self.limit} steps in a row; lower {stage}.lr, or try another seed"
            )
        return int(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """The count, and the row that a resumed run goes on with; waits for the device."""
        return {"skipped": self._skipped, "row": self._row, "first": self._first, "blamed": self._blamed_names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self._skipped.copy_(state["skipped"])
        self._row.copy_(state["row"])
        self._first.copy_(state["first"])
        self._over.zero_()  # a run that is over saves nothing
        self._names = tuple(state["blamed"])
        self._blamed = torch.tensor(list(state["blamed"].values()), dtype=torch.bool, device=self._row.device)

    def _blamed_names(self) -> dict[str, bool]:
        return dict(zip(self._names, self._blamed.tolist(), strict=True))
