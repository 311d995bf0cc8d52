"""Gradients of several losses of one network, each weighted after it is known how hard it pulls.

The published way takes the gradient of each loss at a layer W first, and then differentiates the weighted sum: the
network's tail and everything behind its output are walked back twice. Here a forward pass is cut in three,

    body -> (h, skip) | tail -> F_x | preconditioning, further networks, loss

and each piece is walked back once. What the tail gives back for one loss is linear in that loss, so its weight can be
put on afterwards; W lies in the tail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Body = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Tail = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CutForward:
    """One forward pass in two pieces; ``F_x`` is a leaf to compute losses from."""

    outputs: tuple[Tensor, Tensor]
    cut: tuple[Tensor, Tensor]
    tail: Tensor
    F_x: Tensor


@dataclass(frozen=True)
class TailGradients:
    """Gradients of one loss at the cut, and at the parameters of the tail."""

    cut: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]


def forward_cut(body: Body, tail: Tail, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> CutForward:
    """The network for the preconditioned input x, cut before its tail and at its output."""
    outputs = body(x, t, s, labels)
    h, skip = (output.detach().requires_grad_() for output in outputs)
    end = tail(h, skip)
    return CutForward(outputs, (h, skip), end, end.detach().requires_grad_())


def pull_tail(forward: CutForward, loss: Tensor, parameters: Sequence[nn.Parameter]) -> TailGradients:
    """Walk ``loss``, which depends on ``forward.F_x``, back to the cut."""
    (grad_F,) = torch.autograd.grad(loss, forward.F_x)
    gradients = torch.autograd.grad(forward.tail, (*forward.cut, *parameters), grad_F)
    return TailGradients(gradients[:2], gradients[2:])


def accumulate(
    forwards: Sequence[CutForward],
    gradients: Sequence[TailGradients],
    weights: Sequence[Tensor | float],
    parameters: Sequence[nn.Parameter],
) -> None:
    """Add the gradient of sum_i weights[i] * loss_i to ``.grad`` of every parameter: one walk back per forward pass."""
    for index, parameter in enumerate(parameters):
        total = sum(weight * gradient.parameters[index] for weight, gradient in zip(weights, gradients, strict=True))
        assert isinstance(total, Tensor)
        parameter.grad = total if parameter.grad is None else parameter.grad + total
    torch.autograd.backward(
        [output for forward in forwards for output in forward.outputs],
        [weight * grad for weight, gradient in zip(weights, gradients, strict=True) for grad in gradient.cut],
    )
