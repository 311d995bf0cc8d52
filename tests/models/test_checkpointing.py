"""Blocks that run again in the backward pass: the same gradients, from less memory."""

import copy

import pytest
import torch
from torch import Tensor

from ctm_fast.models import ARCHITECTURES, UNet, build_network
from ctm_fast.training.pullback import forward_cut, pull_tail, walk_back


def network(arch: str = "ddpmpp", dropout: float = 0.3, num_blocks: int = 1) -> UNet:
    torch.manual_seed(0)
    net = build_network(
        arch=arch, img_resolution=16, img_channels=1, label_dim=3, model_channels=32, channel_mult=(1, 2),
        num_blocks=num_blocks, attn_resolutions=(8,), dropout=dropout, s_branch=True,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def gradients(net: UNet, *, compile: str | None = None) -> tuple[list[Tensor], int]:
    """Of two losses, each pass cut at the tail, before one walk back; and the bytes that the bodies saved for it."""
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 1, 16, 16).unbind()
    t, s, labels = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([1.0, 0.1, 0.5]), torch.tensor([0, 2, 1])
    body = torch.compile(net.body, backend=compile, fullgraph=True) if compile else net.body
    storages: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parameters = net.tail_parameters()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forwards = [forward_cut(body, net.tail, image, t, s, labels) for image in (x, y)]
    pulled = [pull_tail(forward, forward.F_x.detach(), parameters) for forward in forwards]
    torch.manual_seed(2)  # what is run again must find its own dropout
    walk_back(pulled, [1.0, 0.3], parameters)
    found = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert len(found) == len(list(net.parameters()))
    return found, sum(kept.untyped_storage().nbytes() for key, kept in storages.items() if key not in own)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_the_same_bits(arch: str) -> None:
    plain = network(arch)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoint_blocks()
    expected, saved = gradients(plain)
    found, kept = gradients(checkpointed)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert kept < 0.6 * saved, (kept, saved)


@pytest.mark.long
def test_compiled() -> None:
    """Traced into one graph. Without dropout: compiled dropout draws other numbers."""
    plain, checkpointed = network(dropout=0.0), network(dropout=0.0)
    checkpointed.checkpoint_blocks()
    expected, _ = gradients(plain)
    found, _ = gradients(checkpointed, compile="aot_eager")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_sampling_runs_nothing_twice() -> None:
    net = network()
    net.checkpoint_blocks()
    calls = []
    net.enc["16x16_block0"].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        net(torch.zeros(1, 1, 16, 16), torch.ones(1), torch.ones(1), torch.tensor([0]))
    assert len(calls) == 1
    gradients(net)
    assert len(calls) == 1 + 2 * 2


def test_a_copy_keeps_it() -> None:
    net = network()
    net.checkpoint_blocks()
    assert gradients(copy.deepcopy(net))[1] == gradients(net)[1]
