"""RAdam in one pass: PyTorch's own to rounding, and a flag that voids a step bit for bit."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ctm_fast.training.radam import RAdam


def network() -> nn.Sequential:
    """Two layers, the convolution in channels_last as the networks have it."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7))
    return net.to(memory_format=torch.channels_last)


def gradients(net: nn.Module, steps: int) -> Iterator[None]:
    """Random gradients of several magnitudes, in the strides of torch's default layout and not of the weights."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn(
                parameter.shape[:1] + (1,) * (parameter.dim() - 1), generator=generator
            )
        yield


def figures(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[Tensor]:
    """Copies of all that a step changes."""
    states = [value for parameter in net.parameters() for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in [*net.parameters(), *states]]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.99)])
def test_is_torchs(betas: tuple[float, float]) -> None:
    """Over the unrectified steps and on, with a learning rate that changes."""
    net, other = network(), network()
    optimizer = RAdam(net.parameters(), lr=3e-3, betas=betas, eps=1e-4)
    reference = torch.optim.RAdam(other.double().parameters(), lr=3e-3, betas=betas, eps=1e-4)
    start = [parameter.detach().double() for parameter in net.parameters()]
    for step, _ in enumerate(gradients(net, 30)):
        for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.double()
        for made in (optimizer, reference):
            made.param_groups[0]["lr"] = 3e-3 / (1 + step)
            made.step()
        for ours, theirs, first in zip(net.parameters(), other.parameters(), start, strict=True):
            moved = (theirs - first).abs().max()
            assert (ours.double() - theirs).abs().max() <= 1e-5 * moved + 2e-7, step


def test_voided_steps_never_were() -> None:
    """NaN gradients under the flag, among the first steps and later: all bits as without these steps."""
    net, other = network(), network()
    optimizer, reference = RAdam(net.parameters(), lr=1e-3), RAdam(other.parameters(), lr=1e-3)
    steps = gradients(net, 20)
    for step in range(20):
        next(steps)
        for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        if step in (0, 3, 4, 11):
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad[..., 0] = torch.nan
            optimizer.found_inf = torch.tensor(1.0)
        else:
            optimizer.found_inf = torch.tensor(0.0)
            reference.step()
        optimizer.step()
        if step:
            pairs = zip(figures(optimizer, net), figures(reference, other), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs), step
    assert optimizer.state[net[0].weight]["step"] == 16


def test_a_step_without_gradients_is_none() -> None:
    net, other = network(), network()
    optimizer, reference = RAdam(net.parameters(), lr=1e-3), RAdam(other.parameters(), lr=1e-3)
    optimizer.step()
    for _ in gradients(net, 3):
        for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(*pair) for pair in zip(figures(optimizer, net), figures(reference, other), strict=True))


def test_scaled_gradients() -> None:
    """Divided by a power of two in the pass: the same bits."""
    net, other = network(), network()
    optimizer, reference = RAdam(net.parameters(), lr=1e-3), RAdam(other.parameters(), lr=1e-3)
    optimizer.grad_scale = torch.tensor(2.0**16)
    for _ in gradients(net, 10):
        for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.clone()
            ours.grad.mul_(2.0**16)
        optimizer.step()
        reference.step()
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("source", [RAdam, torch.optim.RAdam])
def test_goes_on_from_a_state(source: type[torch.optim.Optimizer]) -> None:
    """Of its own to the same bits, of torch's RAdam to rounding; moments read in other strides are put in order."""
    net = network()
    whole = source(net.parameters(), lr=1e-3)  # type: ignore[call-arg]
    steps = gradients(net, 14)
    for _ in range(7):
        next(steps)
        whole.step()
    state = copy.deepcopy(whole.state_dict())
    for values in state["state"].values():
        values.update({name: value.contiguous() for name, value in values.items()})
    resumed_net = copy.deepcopy(net)
    resumed = RAdam(resumed_net.parameters(), lr=1.0)
    resumed.load_state_dict(state)
    for _ in steps:
        for ours, theirs in zip(resumed_net.parameters(), net.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.clone()
        whole.step()
        resumed.step()
    for ours, theirs in zip(resumed_net.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs) if source is RAdam else torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number from 0 on, got -1.0"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "betas: expected"),
        ({"lr": 1.0, "eps": 0.0}, "eps: expected a positive number, got 0.0"),
    ],
)
def test_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RAdam(network().parameters(), **arguments)  # type: ignore[arg-type]
