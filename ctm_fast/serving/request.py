"""What a call asks for, checked before any work: seeds, classes, and how the images are sampled."""

import operator
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.samplers import generation_sigmas, renoise_levels
from ctm_fast.serving.labels import labels_of_seeds

Output = Literal["float", "uint8", "pil"]
Integers = Iterable[int]
"""Of Python, NumPy or PyTorch."""

MAX_SEED = 2**63 - 1
MAX_STEPS = 10_000
MAX_IMAGES = 1_000_000
MAX_GUIDANCE = 1000.0


@dataclass(frozen=True)
class Plan:
    """How images are sampled, whatever their seeds and classes: those of one plan can be made together.

    ``sigmas``, ``gamma`` and ``guidance`` are as :func:`ctm_fast.samplers.generate` takes them.
    """

    sigmas: tuple[float, ...]
    gamma: float
    guidance: float | None


@dataclass(frozen=True)
class Request:
    """One image for each of ``seeds``; ``labels`` are as many, or None for an unconditional model."""

    seeds: list[int]
    labels: list[int] | None
    plan: Plan
    output: Output


def check_request(
    model: CTM | EDMDenoiser,
    seeds: Integers,
    plan: Plan,
    labels: Integers | int | None,
    output: Output,
) -> Request:
    """The request, or ConfigError naming the argument that is wrong."""
    checked = check_integers("seeds", seeds, MAX_SEED)
    if output not in get_args(Output):
        raise ConfigError(f"output: expected one of {', '.join(get_args(Output))}, got {output!r}")
    return Request(checked, check_labels(model, checked, labels), plan, output)


def check_plan(
    model: CTM | EDMDenoiser,
    levels: Levels,
    steps: int | None,
    gamma: float,
    sigmas: Iterable[float] | None,
    guidance: float | None,
) -> Plan:
    """The plan, or ConfigError or LevelError naming the argument that is wrong."""
    if sigmas is None:
        (count,) = check_integers("steps", [1 if steps is None else steps], MAX_STEPS)
        if count < 1:
            raise ConfigError(f"steps: expected an integer in 1..{MAX_STEPS}, got 0")
        chosen = tuple(generation_sigmas(model, count, levels))
    elif steps is not None:
        raise ConfigError(f"steps: expected none beside sigmas, which say how many there are, got {steps!r}")
    else:
        chosen = _check_sigmas(model, levels, sigmas)
    share = _number("gamma", gamma)
    if isinstance(model, CTM):
        renoise_levels(chosen, share)
    elif not 0 <= share <= 1:
        raise LevelError(f"gamma: expected 0 <= gamma <= 1, got {gamma}")
    elif share:
        raise ConfigError(f"gamma: expected 0 for a teacher, whose solver is deterministic, got {gamma}")
    return Plan(chosen, share, _check_guidance(model, guidance))


def check_labels(
    model: CTM | EDMDenoiser, seeds: Sequence[int], labels: Integers | int | None = None
) -> list[int] | None:
    """The class of each seed's image, by default seed modulo the number of classes; None for an unconditional model.

    ConfigError for classes that there are not, or another number of them than of seeds.
    """
    classes = model.net.label_dim
    if classes == 0:
        if labels is not None:
            raise ConfigError("labels: expected None for an unconditional model, got labels")
        return None
    if labels is None:
        return labels_of_seeds(seeds, classes)
    if isinstance(labels, Iterable):
        checked = check_integers("labels", labels, classes - 1)
    else:
        checked = check_integers("labels", [labels], classes - 1) * len(seeds)
    if len(checked) != len(seeds):
        raise ConfigError(f"labels: expected {len(seeds)}, one for each seed, got {len(checked)}")
    return checked


def check_integers(name: str, values: object, highest: int) -> list[int]:
    """``values`` (of Python, NumPy or PyTorch) as Python integers; ConfigError unless all are in 0..highest.

    More than ``MAX_IMAGES`` are refused, before they are looked at if they say how many they are.
    """
    if not isinstance(values, Iterable):
        raise ConfigError(f"{name}: expected a sequence of integers, got {values!r}")
    too_many = ConfigError(f"{name}: expected at most {MAX_IMAGES} in a call, got more")
    try:
        if isinstance(values, Sized) and len(values) > MAX_IMAGES:
            raise too_many
        numbers: list[int] = []
        for value in values:
            number = _integer(value)
            if not 0 <= number <= highest:
                raise ConfigError(f"{name}: expected integers in 0..{highest}, got {value!r}")
            if len(numbers) == MAX_IMAGES:
                raise too_many
            numbers.append(number)
    except (OverflowError, TypeError) as error:  # a range longer than any memory; an array without a dimension
        raise ConfigError(f"{name}: expected a sequence of integers, got {values!r}: {error}") from error
    return numbers


def check_number(name: str, value: object, highest: float) -> float:
    """``value`` (of Python or NumPy) as a float; ConfigError unless it is a number in 0..highest."""
    number = _number(name, value)
    if not 0 <= number <= highest:
        raise ConfigError(f"{name}: expected a number in 0..{highest:g}, got {value!r}")
    return number


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real):
        raise ConfigError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name}: expected a number, got {value!r:.80}...: {error}") from error


def _integer(value: object) -> int:
    """-1 for what is none."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1


def _check_sigmas(model: CTM | EDMDenoiser, levels: Levels, sigmas: Iterable[float]) -> tuple[float, ...]:
    least = 2 if isinstance(model, CTM) else 1
    if isinstance(sigmas, str | bytes) or not isinstance(sigmas, Iterable):
        raise ConfigError(f"sigmas: expected a list of levels, got {sigmas!r}")
    chosen: list[float] = []
    for value in sigmas:
        if len(chosen) > MAX_STEPS:
            raise ConfigError(f"sigmas: expected at most {MAX_STEPS + 1} levels, got more")
        try:
            sigma = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ConfigError(f"sigmas: expected numbers, got {value!r:.80}") from error
        if not levels.sigma_min <= sigma <= levels.sigma_max:
            raise LevelError(
                f"sigmas: expected levels in {levels.sigma_min}..{levels.sigma_max}, those of the model, got {sigma}"
            )
        if chosen and sigma >= chosen[-1]:
            raise LevelError(f"sigmas: expected strictly decreasing levels, got {chosen[-1]} then {sigma}")
        chosen.append(sigma)
    if len(chosen) < least:
        raise LevelError(f"sigmas: expected at least {least} levels, got {len(chosen)}")
    return tuple(chosen)


def _check_guidance(model: CTM | EDMDenoiser, guidance: float | None) -> float | None:
    if guidance is None:
        return None
    weight = check_number("guidance", guidance, MAX_GUIDANCE)
    if not (model.net.label_dim and model.net.config.label_dropout):
        raise ConfigError(
            f"guidance: expected None for a model that was not trained with label dropout, got {guidance}"
        )
    return weight
