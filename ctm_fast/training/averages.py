"""Several exponential moving averages of one model at once, in one pass over memory each."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.training.memory_order import in_memory_order, in_order_of
from ctm_fast.training.power_ema import gamma_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ConstantRate:
    """m <- rate m + (1 - rate) theta, without bias correction: it starts as the model's first weights."""

    rate: float

    def weight(self, step: int) -> float:
        """That of theta after update number ``step``, counted from 1."""
        return 1 - self.rate


@dataclass(frozen=True)
class PowerFunction:
    """m <- beta m + (1 - beta) theta, beta = (1 - 1 / t)^(gamma + 1) after step t: EDM2 (arXiv 2312.02696), Eq. 127.

    ``sigma_rel`` is the width of what is averaged, relative to the length of training. The first weights of the model
    are not in it. Any other width can be had after training: :mod:`ctm_fast.training.reconstruction`.
    """

    sigma_rel: float

    def weight(self, step: int) -> float:
        """That of theta after update number ``step``, counted from 1."""
        return float(1 - (1 - 1 / step) ** (gamma_of(self.sigma_rel) + 1))


def parse_average(name: str) -> ConstantRate | PowerFunction:
    """What a name means: ``"0.999"`` a constant rate, ``"power:0.05"`` a power function of that width.

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(r"(power:)?([0-9]{0,4}\.?[0-9]{1,12})", name)
    if not match:
        raise ConfigError(f"ema: expected a rate such as 0.999 or a width such as power:0.05, got {name!r}")
    value = float(match[2])
    if match[1]:
        gamma_of(value)
        return PowerFunction(value)
    if not 0 <= value < 1:
        raise ConfigError(f"ema: expected a rate from 0 on and below 1, got {name!r}")
    return ConstantRate(value)


class Averages(Generic[Model]):
    """Averages of the parameters of ``model``; buffers are copied from it.

        averages = Averages(model, ["0.999", "power:0.05", "power:0.10"])
        averages.update(step)                     # after each update of the model, from 1
        averages.model_of("power:0.05")           # a module like the model, in eval mode

    All start as the model is. The models of :meth:`model_of` are the averages themselves, and change with them. FSDP's
    models cannot be copied: make the averages first, then shard the model and theirs alike; shards are averaged.

    Args:
        model: in training; parameters float32 (others would not see the small weights of an average).
        names: see :func:`parse_average`.

    Raises ConfigError for a name that means nothing or is there twice, TypeError naming a parameter not in float32.
    """

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            raise ConfigError(f"ema: expected different averages, got {', '.join(names)}")
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"model: expected float32 parameters, got {parameter.dtype} for {name}")
        self._rules = {name: parse_average(name) for name in names}
        self._model = model
        self._models = {name: copy.deepcopy(model).eval().requires_grad_(False) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are kept."""
        return tuple(self._rules)

    @torch.no_grad()
    def update(self, step: int, *, found_inf: Tensor | None = None) -> None:
        """Take in the model after its update number ``step``, counted from 1.

        Where ``found_inf``, a float32 scalar on the device, is not zero, no average changes; the host does not wait.
        """
        if step < 1:
            raise ValueError(f"step: expected a number from 1 on, got {step}")
        for name, rule in self._rules.items():
            lerp(self._models[name], self._model, rule.weight(step), found_inf=found_inf)

    def model_of(self, name: str) -> Model:
        """The average called ``name``; ConfigError if it is not kept."""
        if name not in self._models:
            raise ConfigError(f"ema: expected one of {', '.join(self._rules)}, got {name!r}")
        return self._models[name]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Name -> state dict of the average; references, not copies."""
        return {name: model.state_dict() for name, model in self._models.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from what :meth:`state_dict` returned; CheckpointError if it is of other averages."""
        if state.keys() != self._rules.keys():
            raise CheckpointError(f"ema: expected averages {', '.join(self._rules)}, got {', '.join(state) or 'none'}")
        for name, model in self._models.items():
            model.load_state_dict(state[name])


@torch.no_grad()
def lerp(average: nn.Module, model: nn.Module, weight: float, *, found_inf: Tensor | None = None) -> None:
    """average <- average + weight (model - average) for every parameter, and average <- model for every buffer.

    Where ``found_inf``, a float32 scalar on the parameters' device, is not zero, nothing changes. A target network that
    follows at a rate of its own is ``lerp(target, model, 1 - rate)``.
    """
    # The step of fused SGD for the gradient model - average, which is a loss gradient of `model` and weight decay -1:
    # one pass, and it minds the flag.
    torch._fused_sgd_(
        [in_memory_order(parameter) for parameter in average.parameters()],
        [in_order_of(kept, current) for kept, current in zip(average.parameters(), model.parameters(), strict=True)],
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=found_inf,
    )
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current if found_inf is None else torch.where(found_inf != 0, kept, current))
