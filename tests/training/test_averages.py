"""Averages against their closed forms, and what a voided step and a resume leave of them."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.training.averages import Averages, lerp
from ctm_fast.training.power_ema import WIDEST, Profile, gamma_of, inner_products, sigma_rel_of, solve_weights


def network() -> nn.Sequential:
    """A convolution in channels_last, as the networks have it, and buffers."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))
    return net.to(memory_format=torch.channels_last)


def walk(net: nn.Module, step: int) -> None:
    """Weights of step ``step``: a function of it."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) + step / 10)


def weights_of(net: nn.Module) -> Tensor:
    """All parameters in float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in net.parameters()])


def test_closed_forms() -> None:
    """m_t = r^t theta_0 + (1 - r) sum r^(t - i) theta_i, and sum (i^(g + 1) - (i - 1)^(g + 1)) theta_i / t^(g + 1)."""
    net = network()
    averages = Averages(net, ["0.9", "power:0.1", "power:0.25"])
    path = [weights_of(net)]
    for step in range(1, 61):
        walk(net, step)
        averages.update(step)
        path.append(weights_of(net))
        if step in (1, 2, 17, 60):
            constant = 0.9**step * path[0] + 0.1 * sum(0.9 ** (step - i) * path[i] for i in range(1, step + 1))
            assert (weights_of(averages.model_of("0.9")) - constant).abs().max() < 2e-6 * constant.abs().max()
            for width in (0.1, 0.25):
                edges = (np.arange(step + 1) / step) ** (gamma_of(width) + 1)
                power = sum(float(part) * theta for part, theta in zip(np.diff(edges), path[1:], strict=True))
                got = weights_of(averages.model_of(f"power:{width}"))
                assert (got - power).abs().max() < 2e-6 * power.abs().max()
    for name in averages.names:
        model = averages.model_of(name)
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(*pair) for pair in zip(model.buffers(), net.buffers(), strict=True))


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_width(width: float) -> None:
    """gamma and sigma_rel are inverse, and the width is the standard deviation of the profile."""
    gamma = gamma_of(width)
    assert gamma >= 0 and sigma_rel_of(gamma) == pytest.approx(width, rel=1e-9)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    profile = (gamma + 1) * tau**gamma / 1_000_000
    mean = (profile * tau).sum()
    assert profile.sum() == pytest.approx(1, abs=1e-6)
    assert (profile * (tau - mean) ** 2).sum() ** 0.5 == pytest.approx(width, rel=1e-4)


def test_inner_products_are_integrals() -> None:
    a, b = Profile(300, 0.05), Profile(400, 0.12)
    tau = (np.arange(400_000) + 0.5) / 1000

    def values(profile: Profile) -> np.ndarray:
        gamma = gamma_of(profile.sigma_rel)
        return np.where(tau < profile.step, (gamma + 1) * (tau / profile.step) ** gamma / profile.step, 0.0)

    for first, second in ((a, b), (b, a), (a, a)):
        integral = (values(first) * values(second)).sum() / 1000
        assert inner_products([first], [second])[0, 0] == pytest.approx(integral, rel=1e-4)


def error_of_fit(every: int, wanted: Profile) -> tuple[float, float]:
    """Of the average ``wanted`` from two widths kept every ``every`` of 400 steps: of a random walk, and the predicted.

    Relative to the change of the weights over training.
    """
    steps, kept = 400, [Profile(step, width) for step in range(every, 401, every) for width in (0.05, 0.1)]
    path = np.random.default_rng(3).standard_normal((steps, 200)).cumsum(0) + 1000

    def average(profile: Profile) -> np.ndarray:
        edges = np.minimum(np.arange(steps + 1) / profile.step, 1) ** (gamma_of(profile.sigma_rel) + 1)
        return np.diff(edges) @ path

    x, predicted = solve_weights(kept, wanted)
    got = sum(float(weight) * average(profile) for weight, profile in zip(x, kept, strict=True))
    return float(np.linalg.norm(got - average(wanted)) / np.linalg.norm(path[-1] - path[0])), predicted


@pytest.mark.parametrize("wanted", [Profile(400, 0.03), Profile(400, 0.08), Profile(400, 0.15), Profile(360, 0.07)])
def test_reconstruction_is_what_was_not_tracked(wanted: Profile) -> None:
    """To 1e-3 from a hundred snapshots, and the better the more there are, as the fit says beforehand."""
    errors = [error_of_fit(every, wanted) for every in (40, 20, 8, 4)]
    assert errors[-1][0] < 1e-3
    for (coarse, coarse_fit), (fine, fine_fit) in itertools.pairwise(errors):
        assert fine < coarse and fine_fit < coarse_fit


def test_reconstruction_keeps_what_does_not_change() -> None:
    """The weights sum to 1, also where the fit is poor; a profile that is there twice is no matter."""
    for kept in ([Profile(100, 0.05)], [Profile(100, 0.05)] * 2, [Profile(step, 0.1) for step in (25, 50, 100)]):
        x, error = solve_weights(kept, Profile(100, 0.06))
        assert x.sum() == pytest.approx(1, abs=1e-12)
        assert 0.01 < error < 0.6
    x, error = solve_weights([Profile(50, 0.05), Profile(100, 0.05)], Profile(100, 0.05))
    assert x == pytest.approx([0, 1], abs=1e-9) and error < 1e-6


def test_a_voided_step_changes_nothing() -> None:
    net = network()
    averages = Averages(net, ["0.9", "power:0.1"])
    walk(net, 1)
    averages.update(1)
    before = copy.deepcopy(averages.state_dict())
    walk(net, 2)
    averages.update(2, found_inf=torch.tensor(1.0))
    for name in averages.names:
        assert all(torch.equal(value, before[name][key]) for key, value in averages.state_dict()[name].items())
    averages.update(2, found_inf=torch.tensor(0.0))
    assert not torch.equal(averages.model_of("0.9")[0].weight, before["0.9"]["0.weight"])


def test_goes_on_from_a_state() -> None:
    """To the same bits; models that were given out are those that go on."""
    net = network()
    whole, resumed = Averages(net, ["0.9", "power:0.1"]), Averages(net, ["0.9", "power:0.1"])
    model = resumed.model_of("power:0.1")
    for step in range(1, 4):
        walk(net, step)
        whole.update(step)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    walk(net, 4)
    for averages in (whole, resumed):
        averages.update(4)
    assert model is resumed.model_of("power:0.1")
    assert torch.equal(weights_of(model), weights_of(whole.model_of("power:0.1")))
    with pytest.raises(CheckpointError, match=r"expected averages 0.99, got 0.9, power:0.1"):
        Averages(net, ["0.99"]).load_state_dict(whole.state_dict())


def test_other_strides() -> None:
    """A model in another memory format than its average: by position, not by place in memory."""
    net = network()
    target = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    walk(net, 5)
    lerp(target, net, 1.0)
    assert torch.allclose(weights_of(target), weights_of(net), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["", "ema", "1.0", "1e-3", "-0.5", "nan", "power:", "power:0", "power:0.3", f"power:{WIDEST + 0.001:.4f}"]
)
def test_refuses_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^ema: expected"):
        Averages(network(), [name])


def test_refuses() -> None:
    averages = Averages(network(), ["0.9"])
    with pytest.raises(ConfigError, match=r"ema: expected one of 0.9, got '0.99'"):
        averages.model_of("0.99")
    with pytest.raises(ValueError, match="step: expected a number from 1 on, got 0"):
        averages.update(0)
    with pytest.raises(ConfigError, match=r"expected different averages, got 0.9, 0.9"):
        Averages(network(), ["0.9", "0.9"])
    with pytest.raises(TypeError, match=r"expected float32 parameters, got torch.float64 for 0.weight"):
        Averages(network().double(), ["0.9"])
