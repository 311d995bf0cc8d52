"""Networks whose blocks lie in pieces on the ranks (FSDP2): ``--parallel fsdp``.

A U-Net is trained cut in body and tail, and what is compared at the tail are gradients of its own parameters. So the
blocks of the body alone are sharded, nearly all of a network: each is gathered before it runs and freed after. The
embedding, the first and the last convolution and the block that is cut stay whole on every rank, and their gradients
are averaged by :func:`ctm_fast.distributed.average_gradients`, as all are without sharding. The gradient of a sharded
parameter is the mean over ranks as it comes.

Every rank must run the same networks in the same order: a call that one rank leaves out, the others wait for.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ctm_fast.distributed import Ranks
from ctm_fast.models import NetworkConfig, UNet, build_network
from ctm_fast.models.unet import Weightless
from ctm_fast.nn import UNetBlock
from ctm_fast.training.placement import Model, Whole


class Sharded(Whole):
    """The blocks of every network's body in pieces on the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def place(self, net: UNet) -> None:
        """See :func:`shard_blocks`."""
        shard_blocks(net)

    def place_frozen(self, net: UNet, dtype: torch.dtype) -> UNet:
        """As any other."""
        shard_blocks(net)
        return net

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Those of :func:`parameter_groups`."""
        return parameter_groups(model)

    def to_average(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those that are not sharded."""
        return split_parameters(parameters)[1]

    def gather(self, model: Model, network: NetworkConfig) -> Model | None:
        """A copy of ``model`` in one piece, in its mode, on the first rank; None on the others."""
        device = model.net.out_conv.weight.device
        weights = full_state_dict(model.net, self.ranks)
        if not self.ranks.is_first:
            return None
        with Weightless():
            net = build_network(network, s_branch=model.net.s_branch)
        net.load_state_dict(weights, assign=True)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its stubs
        whole = type(model)(net, model.sigma_data).to(device)
        whole.dtype = model.dtype
        return cast("Model", whole.requires_grad_(False).train(model.training))


def shard_blocks(net: UNet) -> None:
    """Leave on this rank its piece of every block of the body of ``net``, whose weights are the same on every rank.

    In place, for a student, an average (copied before: a sharded network cannot be) or a teacher; parameters that
    require no gradient let it through to the input. Optimizers are made afterwards, of :func:`parameter_groups`.

    Convolutions lose their channels_last weights, which FSDP2 refuses ("does not support non-contiguous parameters");
    images stay in channels_last.
    """
    blocks = [module for module in net.modules() if isinstance(module, UNetBlock) and module is not net.last_block]
    for block in blocks:
        for parameter in block.parameters():
            parameter.data = parameter.data.contiguous()
        fully_shard(block)
    _, whole = split_parameters(net.parameters())
    # The root has nothing of its own: it lets the next block's all-gather run beside this block's work.
    fully_shard(net, ignored_params={*whole})
    register_fsdp_forward_method(net, "body")


def split_parameters(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The sharded ones, and those that every rank has whole: the ones to give to ``average_gradients``."""
    sharded: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (sharded if isinstance(parameter, DTensor) else whole).append(parameter)
    return sharded, whole


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """For an optimizer: sharded parameters and whole ones apart, which one ``foreach`` call refuses to mix."""
    return [{"params": parameters} for parameters in split_parameters(model.parameters()) if parameters]


@torch.no_grad()
def full_state_dict(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict of ``model`` in whole tensors on the CPU of rank 0, and nothing on the others; all must call."""
    whole: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # One tensor at a time: a rank never holds more than one that is not its own.
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.is_first:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
