"""How the networks of a stage lie on the ranks: whole on each, or their blocks in shards (``--parallel fsdp``)."""

import importlib
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, UNet
from ctm_fast.models.prepacked import pack_winograd
from ctm_fast.training.execution import Execution

Model = TypeVar("Model", bound=CTM | EDMDenoiser)


class Whole:
    """All of every network on every rank, and on a rank that is alone."""

    def place(self, net: UNet) -> None:
        """Leave on this rank its part of ``net``, which is the same on every rank; optimizers are made afterwards."""

    def place_frozen(self, net: UNet, dtype: torch.dtype) -> UNet:
        """As :meth:`place`, of a network that no step changes, for passes without gradients in ``dtype``."""
        return pack_winograd(net, dtype) if net.out_conv.weight.device.type == "cpu" else net

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters of ``model`` for an optimizer."""
        return [{"params": list(model.parameters())}]

    def to_average(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those whose gradients are of this rank's samples alone, after they are walked back."""
        return list(parameters)

    def gather(self, model: Model, network: NetworkConfig) -> Model | None:
        """``model``, of ``network``, in one piece on the first rank, at least; every rank calls."""
        return model


def placement(execution: Execution) -> Whole:
    """The way of ``execution``; one rank has nothing to share."""
    if not execution.fsdp or execution.ranks.size == 1:
        return Whole()
    sharded = importlib.import_module("ctm_fast.training.sharded")  # PyTorch's FSDP takes seconds to import
    way: Whole = sharded.Sharded(execution.ranks)
    return way
