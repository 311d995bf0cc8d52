"""Samples through networks, counted."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ctm_fast.models import CTM, EDMDenoiser


class Evaluations:
    """Forward-equivalents: a sample once through a network is 1, its gradient to the input 1, to weights as well 2.

    What is walked back no further than to a network's last layers is not counted.
    """

    def __init__(self, models: list[CTM | EDMDenoiser]) -> None:
        self.count = 0
        for model in models:
            net = model.net
            net.embedding.register_forward_pre_hook(lambda _, args: self._add(len(args[0])))
            block = list(net.enc.values())[-1]
            weight = 2 if any(parameter.requires_grad for parameter in net.parameters()) else 1

            def hook(_: nn.Module, __: Any, grads: Any, weight: int = weight) -> None:
                self._add(weight * len(grads[0]))

            block.register_full_backward_hook(hook)

    def _add(self, count: int) -> None:
        self.count += count

    def of(self, call: Callable[[], object]) -> int:
        """Of one call."""
        before = self.count
        call()
        return self.count - before
