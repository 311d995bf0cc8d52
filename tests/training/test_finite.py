"""Steps that are not finite leave every bit as it was, are counted without waiting, and end the run in a row."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.distributed import Ranks
from ctm_fast.errors import ConfigError, DivergedError
from ctm_fast.training.averages import Averages
from ctm_fast.training.finite import FiniteGuard
from ctm_fast.training.precision import LossScale
from ctm_fast.training.radam import RAdam
from tests.ranks import in_ranks

CPU = torch.device("cpu")


class Training:
    """A linear model with everything behind the gradients, and losses to plant faults in."""

    def __init__(self, limit: int = 3) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.optimizer = RAdam(self.model.parameters(), lr=1e-2)
        self.averages = Averages(self.model, ["0.9", "power:0.1"])
        self.guard = FiniteGuard(limit, CPU)
        self.scale = LossScale(CPU, start=4.0, growth_interval=5)

    def step(self, step: int, fault: float = 1.0, place: str = "dsm_loss") -> None:
        """Step ``step``, with ``place``, a loss or the gradients, multiplied by ``fault``."""
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        y = self.model(x)
        losses = {"ctm_loss": y.square().mean(1), "dsm_loss": (y - 1).square().mean(1)}
        if place in losses:
            losses[place] = losses[place] * torch.tensor([1.0] * 7 + [fault])
        self.optimizer.zero_grad()
        self.scale.scale(losses["ctm_loss"].mean() + losses["dsm_loss"].mean()).backward()
        if place == "gradients":
            assert self.model[2].bias.grad is not None
            self.model[2].bias.grad.mul_(fault)
        self.tail(step, losses)

    def tail(self, step: int, losses: dict[str, Tensor]) -> None:
        """Everything behind the gradients."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        found_inf = self.guard.check(step, losses, torch.nn.utils.get_total_norm(gradients))
        self.optimizer.found_inf, self.optimizer.grad_scale = found_inf, self.scale.value
        self.optimizer.step()
        self.averages.update(step, found_inf=found_inf)
        self.scale.update(found_inf)

    def kept(self) -> list[Tensor]:
        """Copies of parameters, state and averages."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        averages = [tensor for name in self.averages.names for tensor in self.averages.state_dict()[name].values()]
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *states, *averages]]


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["ctm_loss", "dsm_loss", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing(place: str, fault: float) -> None:
    training = Training()
    for step in range(1, 10):
        training.step(step)
    before, scale = training.kept(), float(training.scale.value)
    training.step(10, fault, place)
    assert all(torch.equal(*pair) for pair in zip(before, training.kept(), strict=True))
    assert training.guard.gather("ctm") == 1
    assert float(training.scale.value) == scale / 2
    training.step(11)
    changed = [not torch.equal(*pair) for pair in zip(before, training.kept(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)
    assert training.guard.gather("ctm") == 1


def test_several_in_a_row_end_the_run() -> None:
    """Not before: two, a finite one, and two are no three. The first of the row is named, whatever comes after."""
    training = Training(limit=3)
    faults = {4: "ctm_loss", 5: "ctm_loss", 7: "ctm_loss", 8: "ctm_loss"}
    for step in range(1, 11):
        training.step(step, math.nan if step in faults else 1.0, faults.get(step, "dsm_loss"))
        assert training.guard.gather("ctm") == sum(fault <= step for fault in faults)
    for step in (11, 12, 13):
        training.step(step, math.inf)
    training.step(14)
    training.step(15, math.nan, "ctm_loss")
    with pytest.raises(DivergedError, match=r"^ctm: .* dsm_loss and gradients that are not from step 11 on, 3 steps"):
        training.guard.gather("ctm")


def test_the_row_goes_on_after_a_resume() -> None:
    training = Training(limit=3)
    for step in (1, 2):
        training.step(step, math.nan)
    resumed = Training(limit=3)
    resumed.guard.load_state_dict(copy.deepcopy(training.guard.state_dict()))
    assert resumed.guard.gather("ctm") == 2
    resumed.step(3, math.nan, "gradients")
    with pytest.raises(DivergedError, match="dsm_loss and gradients that are not from step 1 on"):
        resumed.guard.gather("ctm")


def test_a_row_that_was_put_back_ends_nothing() -> None:
    training = Training(limit=2)
    training.step(1)
    before = copy.deepcopy(training.guard.state_dict())
    for step in (2, 3):
        training.step(step, math.nan)
    training.guard.load_state_dict(before)
    assert training.guard.gather("ctm") == 0


class _NoWaiting(TorchDispatchMode):
    """Refuses what would have the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    """Once RAdam's rectification is on, which takes six steps."""
    training = Training()
    for step in range(1, 8):
        training.step(step)
    losses = {"ctm_loss": torch.ones(8), "dsm_loss": torch.full((8,), math.nan)}
    with _NoWaiting():
        training.tail(8, losses)
        with pytest.raises(AssertionError, match="waits for the device"):
            training.guard.gather("ctm")


def _sharded(ranks: Ranks, directory: Path) -> list[Any]:
    """A finite step, and one that is not on rank 1, with FSDP: whole weights, moments and averages after each."""
    torch.manual_seed(1)
    model = nn.Linear(6, 4)
    averages = Averages(model, ["0.9"])
    for sharded in (model, averages.model_of("0.9")):
        fully_shard(sharded, mesh=init_device_mesh("cpu", (ranks.size,)))
    optimizer, guard = RAdam(model.parameters(), lr=1e-2), FiniteGuard(2, CPU)
    seen = []
    for step in (1, 2):
        loss = model(torch.full((2, 6), float(step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        bad = step == 2 and ranks.rank == 1
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        found_inf = guard.check(step, {"loss": loss * math.nan if bad else loss}, norm.full_tensor())
        optimizer.found_inf = found_inf
        optimizer.step()
        averages.update(step, found_inf=found_inf)
        kept = [model.weight, optimizer.state[model.weight]["exp_avg"], averages.model_of("0.9").weight]
        seen += [found_inf, *(tensor.full_tensor().detach() for tensor in kept)]
    return [*seen, guard.gather("ctm")]


def test_one_rank_voids_the_step_of_all(tmp_path: Path) -> None:
    """With shards of one model on two ranks; the finite step is that of one rank with the whole model."""
    for flag, *first, second_flag, weight, moment, average, skipped in in_ranks(_sharded, 2, tmp_path):
        assert (float(flag), float(second_flag), skipped) == (0, 1, 1)
        assert all(torch.equal(*pair) for pair in zip(first, [weight, moment, average], strict=True))
        torch.manual_seed(1)
        model = nn.Linear(6, 4)
        start = model.weight.detach().clone()
        optimizer, averages = RAdam(model.parameters(), lr=1e-2), Averages(model, ["0.9"])
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
        averages.update(1)
        assert not torch.allclose(weight, start)
        expected = [model.weight, optimizer.state[model.weight]["exp_avg"], averages.model_of("0.9").weight]
        assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(first, expected, strict=True))


def test_refuses_a_limit_of_none() -> None:
    with pytest.raises(ConfigError, match="expected a number from 1 on, got 0"):
        FiniteGuard(0, CPU)
