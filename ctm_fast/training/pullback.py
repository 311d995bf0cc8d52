"""Gradients of several losses of one network, each weighted after it is known how hard it pulls.

The published way takes the gradient of each loss at a layer W first, and then differentiates the weighted sum: the
network's tail and everything behind its output are walked back twice. Here a forward pass is cut in three,

    body -> (h, skip) | tail -> F_x | preconditioning, further networks, loss

and each piece is walked back once. What the tail gives back for one loss is linear in that loss, so its weight can be
put on afterwards; W lies in the tail. A loss with a forward pass of its own is walked back at once into a store, which
frees its activations; so is every loss where a batch comes in several pieces and its weight is known after the last.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
class Pulled:
    """Gradients of one loss: at the cut of ``forward``, at the parameters of the tail, and at others directly."""

    forward: CutForward
    cut: tuple[Tensor, ...]
    tail: tuple[Tensor, ...]
    direct: tuple[tuple[nn.Parameter, Tensor], ...] = ()
    """Of a second pass through the network, behind the one that is cut."""

    def at(self, parameters: Sequence[nn.Parameter], layer: int) -> Tensor:
        """The gradient at parameter number ``layer`` of the tail's."""
        return sum((grad for parameter, grad in self.direct if parameter is parameters[layer]), self.tail[layer])


def forward_cut(body: Body, tail: Tail, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> CutForward:
    """The network for the preconditioned input x, cut before its tail and at its output."""
    outputs = body(x, t, s, labels)
    h, skip = (output.detach().requires_grad_() for output in outputs)
    end = tail(h, skip)
    return CutForward(outputs, (h, skip), end, end.detach().requires_grad_())


def pull_tail(
    forward: CutForward,
    grad_F: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    direct: Sequence[tuple[nn.Parameter, Tensor]] = (),
    again: bool = False,
) -> Pulled:
    """Walk a loss's gradient at ``forward.F_x`` back to the cut; ``again``: another loss will be, too."""
    gradients = torch.autograd.grad(forward.tail, (*forward.cut, *parameters), grad_F, retain_graph=again)
    return Pulled(forward, gradients[:2], gradients[2:], tuple(direct))


def walk_back(
    pulled: Sequence[Pulled],
    weights: Sequence[Tensor | float],
    parameters: Sequence[nn.Parameter],
    *,
    again: bool = False,
) -> None:
    """Add the gradient of sum_i weights[i] * loss_i to ``.grad``: one walk back through each forward pass.

    ``parameters`` are the tail's; ``again``: the same passes will be walked for another loss, too.
    """
    for weight, each in zip(weights, pulled, strict=True):
        for parameter, gradient in (*zip(parameters, each.tail, strict=True), *each.direct):
            _add(parameter, weight * gradient)
    at_cut: dict[int, tuple[CutForward, list[Tensor]]] = {}
    for weight, each in zip(weights, pulled, strict=True):
        scaled = [weight * grad for grad in each.cut]
        before = at_cut.get(id(each.forward))
        if before is not None:
            scaled = [a + b for a, b in zip(before[1], scaled, strict=True)]
        at_cut[id(each.forward)] = (each.forward, scaled)
    torch.autograd.backward(
        [output for forward, _ in at_cut.values() for output in forward.outputs],
        [grad for _, grads in at_cut.values() for grad in grads],
        retain_graph=again,
    )


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class GradientStore:
    """A second set of gradients of the same parameters, for a loss whose weight is not known yet."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, what is added to ``.grad`` of the parameters is added here."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of ``parameter``, None if there is none."""
        return next(g for p, g in zip(self.parameters, self.gradients, strict=True) if p is parameter)

    def release(self, weight: Tensor | float) -> None:
        """Add ``weight`` times what is here to ``.grad``, and forget it."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                _add(parameter, gradient.mul_(weight))
        self.gradients = [None] * len(self.parameters)

    def _exchange(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self.gradients[index] = self.gradients[index], parameter.grad
