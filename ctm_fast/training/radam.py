"""RAdam in one pass over memory, with steps that a flag on the device can void."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ctm_fast.training.memory_order import in_memory_order, in_order_of, local


class RAdam(torch.optim.Optimizer):
    """RAdam (arXiv 1908.03265), Algorithm 2, without weight decay.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        rho_inf = 2 / (1 - beta2) - 1,  rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
        r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        theta <- theta - lr / (1 - beta1^t) m r sqrt(1 - beta2^t) / (sqrt(v) + eps)      where rho > 5
        theta <- theta - lr / (1 - beta1^t) m                                            in the first steps

    The same as ``torch.optim.RAdam`` to rounding, with the same state, but PyTorch's fused Adam makes the pass: it
    reads and writes each tensor once. As other fused optimizers of PyTorch it takes two attributes that are set before
    :meth:`step`: where ``found_inf`` (float32 scalar on the device) is not zero, the step changes nothing, neither
    parameters nor state; gradients are divided by ``grad_scale`` (likewise) in the pass. The host waits for the device
    only in the first steps, to learn when rho passes 5.

    Parameters that have a gradient must have one at every step. Sharded tensors (DTensor) are updated shard by shard.

    Args:
        parameters: of one dtype and device, or groups of them.
        lr: the learning rate; schedules set ``param_groups[i]["lr"]``.
        betas: of the moments.
        eps: added to sqrt(v).
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: expected a number from 0 on, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        self._rectified = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are for line searches
        """Update every parameter that has a gradient."""
        rectified = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                rectified.append(self._step(group, parameters))
        self._rectified = bool(rectified) and all(rectified)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict()`` returned, of this class or of ``torch.optim.RAdam``."""
        super().load_state_dict(state_dict)
        self._rectified = False
        for group in self.param_groups:
            for parameter in group["params"]:
                if "step" in self.state[parameter]:
                    device = local(parameter).device
                    self.state[parameter]["step"] = self.state[parameter]["step"].to(device, torch.float32)

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> bool:
        """Whether rho was above 5."""
        states = [self._state(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        t = (steps[0] + 1).double()
        rate = group["lr"] / (1 - beta1**t)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rectified = self._rectified or bool(rho > 5)
        if rectified:
            r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
            rate, eps = rate * r * (1 - beta2**t).sqrt(), group["eps"]
        else:  # beside such an eps sqrt(v) vanishes in rounding, and a power of two is rounded nowhere
            rate, eps = rate * _HUGE, _HUGE
        found_inf = self.found_inf
        torch._fused_adam_(
            [in_memory_order(parameter) for parameter in parameters],
            [in_order_of(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None],
            [in_memory_order(state["exp_avg"]) for state in states],
            [in_memory_order(state["exp_avg_sq"]) for state in states],
            [],
            [torch.full_like(steps[0], _LATE)] * len(parameters),
            lr=rate.float(),
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=found_inf,
        )
        torch._foreach_add_(steps, [torch.ones_like(t) if found_inf is None else 1 - found_inf] * len(steps))
        return rectified

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=local(parameter).device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter)
        for name in _MOMENTS:  # what was read from a file may have other strides
            if local(state[name]).stride() != local(parameter).stride():
                state[name] = torch.zeros_like(parameter).copy_(state[name])
        return state


_MOMENTS = ("exp_avg", "exp_avg_sq")
_HUGE = 2.0**60
_LATE = 2.0**40
"""A step at which fused Adam's own bias corrections, 1 - beta^t, are 1."""
