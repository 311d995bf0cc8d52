"""What a run is: frozen dataclasses, and ``--set a.b=c`` on top of them.

Everything here changes the result of a run and is written into each of its files. What does not (device, threads,
compilation, where it is written) is an argument of the command line.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from ctm_fast.data import MAX_CLASSES
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError, LevelError
from ctm_fast.losses.distance import DISTANCES
from ctm_fast.models import ARCHITECTURES, S_INITS, NetworkConfig, build_network
from ctm_fast.models.unet import Weightless

STAGES = ("teacher", "ctm")
_FILLED_IN = {
    "preset": "--preset chooses",
    "data_sha256": "the run fills in",
    "teacher_sha256": "the run fills in",
}


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = "digits"
    """``digits`` (in the package), ``fashion-mnist``, or a path: see :func:`ctm_fast.data.load_dataset`."""
    conditional: bool = True
    """Whether the labels condition the network."""
    flip: bool = False
    """Whether half of the images are mirrored."""


@dataclass(frozen=True)
class TeacherConfig:
    """EDM (arXiv 2206.00364): ln sigma ~ N(p_mean, p_std^2), Adam, constant-rate EMA."""

    steps: int = 1000
    batch: int = 128
    lr: float = 1e-3
    ema: float = 0.995
    p_mean: float = -1.2
    p_std: float = 1.2


@dataclass(frozen=True)
class CTMConfig:
    """CTM + DSM (arXiv 2310.02279): RAdam, an EMA that is also the target network."""

    steps: int = 1000
    batch: int = 64
    lr: float = 4e-4
    lr_decay: bool = False
    """Whether the learning rate falls linearly to 0 over the steps."""
    ema: float = 0.999
    points: int = 18
    """N: points of the training grid."""
    max_solver_steps: int = 17
    """M: the teacher takes k in 1..M Heun steps from t to u, P(k) proportional to k."""
    distance: str = "pseudo-huber"
    huber_c: float = 0.03
    dsm_weight: float = 1.0
    adaptive_layer: str = "output"
    """Where the adaptive weight compares gradients: ``output`` (output convolution, published for CIFAR-10) or
    ``block`` (second convolution of the last block, published for ImageNet)."""
    s_init: str = "zero"
    """How the student's s-branch starts: ``zero``, so that it starts as its teacher, or ``published``, random."""
    uniform_to: float = 0.7
    """DSM's second half draws its level from the first ``uniform_to`` of the schedule."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run: two runs of equal configuration on one machine are equal. Raises ConfigError naming the key."""

    preset: str = "digits"
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    data_sha256: str = ""
    """Of the images and labels that were read; filled in by the run."""
    teacher_sha256: str = ""
    """Of the file given as ``--teacher``, filled in by the run; empty if it trains its own."""
    sigma_data: float = 0.5
    data: DataConfig = field(default_factory=DataConfig)
    levels: Levels = field(default_factory=Levels)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    ctm: CTMConfig = field(default_factory=CTMConfig)
    snapshot_every: int = 500
    """Steps between two saves of state, snapshot and sample grid; the last step of a stage is always saved."""
    log_every: int = 20

    def __post_init__(self) -> None:
        for key, value in _leaves(dataclasses.asdict(self)):
            _expect(not isinstance(value, float) or math.isfinite(value), key, "a finite number", value)
        names_a_directory = re.fullmatch(r"[A-Za-z0-9_.-]+", self.preset) is not None
        _expect(names_a_directory, "preset", "letters, digits, dots, dashes", self.preset)
        _expect(0 <= self.seed < 2**30, "seed", "0 <= seed < 2^30", self.seed)
        _expect(self.stages in (STAGES, STAGES[:1], STAGES[1:]), "stages", "teacher,ctm or teacher or ctm", self.stages)
        _expect(self.sigma_data > 0, "sigma_data", "a positive number", self.sigma_data)
        _expect(self.snapshot_every > 0, "snapshot_every", "a positive number", self.snapshot_every)
        _expect(self.log_every > 0, "log_every", "a positive number", self.log_every)
        for name, stage in (("teacher", self.teacher), ("ctm", self.ctm)):
            _expect(0 < stage.steps < 2**31, f"{name}.steps", "0 < steps < 2^31", stage.steps)
            _expect(0 < stage.batch <= 2**20, f"{name}.batch", "0 < batch <= 2^20", stage.batch)
            _expect(stage.lr > 0, f"{name}.lr", "a positive number", stage.lr)
            _expect(0 <= stage.ema < 1, f"{name}.ema", "0 <= ema < 1", stage.ema)
        _expect(self.teacher.p_std > 0, "teacher.p_std", "a positive number", self.teacher.p_std)
        _expect(1 <= self.levels.rho <= 100, "levels.rho", "1 <= rho <= 100", self.levels.rho)
        _expect(2 <= self.ctm.points <= 10_000, "ctm.points", "2 <= points <= 10000", self.ctm.points)
        _expect(
            1 <= self.ctm.max_solver_steps < self.ctm.points,
            "ctm.max_solver_steps",
            f"1 <= max_solver_steps < ctm.points = {self.ctm.points}",
            self.ctm.max_solver_steps,
        )
        _expect(self.ctm.distance in DISTANCES, "ctm.distance", " or ".join(DISTANCES), self.ctm.distance)
        _expect(self.ctm.huber_c > 0, "ctm.huber_c", "a positive number", self.ctm.huber_c)
        _expect(self.ctm.dsm_weight >= 0, "ctm.dsm_weight", "a number not below 0", self.ctm.dsm_weight)
        layer = self.ctm.adaptive_layer
        _expect(layer in ("output", "block"), "ctm.adaptive_layer", "output or block", layer)
        _expect(self.ctm.s_init in S_INITS, "ctm.s_init", " or ".join(S_INITS), self.ctm.s_init)
        _expect(0 < self.ctm.uniform_to <= 1, "ctm.uniform_to", "0 < uniform_to <= 1", self.ctm.uniform_to)
        _expect(
            self.data.conditional == (self.network.label_dim > 0),
            "network.label_dim",
            "the number of classes if data.conditional, else 0",
            self.network.label_dim,
        )
        _check_network(self.network)

    def stage_seed(self, stage: str) -> int:
        """The seed of everything that ``stage`` draws: another one for each stage, below 2^31."""
        return 2 * self.seed + STAGES.index(stage)


def _check_network(network: NetworkConfig) -> None:
    """The range of each size by itself."""
    for key, low, high in (
        ("img_resolution", 1, 1024),
        ("model_channels", 2, 4096),
        ("num_blocks", 1, 64),
        ("label_dim", 0, MAX_CLASSES),
        ("head_channels", 0, 4096),
    ):
        value = getattr(network, key)
        _expect(low <= value <= high, f"network.{key}", f"{low} <= {key} <= {high}", value)
    mult = network.channel_mult
    _expect(network.arch in ARCHITECTURES, "network.arch", " or ".join(ARCHITECTURES), network.arch)
    _expect(network.augment_dim == 0, "network.augment_dim", "0: no run augments its images", network.augment_dim)
    _expect(network.img_channels in (1, 3), "network.img_channels", "1 or 3", network.img_channels)
    _expect(1 <= len(mult) <= 10, "network.channel_mult", "1 to 10 numbers", mult)
    _expect(all(1 <= value <= 64 for value in mult), "network.channel_mult", "numbers in 1..64", mult)
    for key in ("dropout", "label_dropout"):
        value = getattr(network, key)
        _expect(0 <= value < 1, f"network.{key}", f"0 <= {key} < 1", value)


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """``config`` with each ``a.b=value`` applied, all at once; values are read by the type of the key.

    Raises ConfigError naming the key, and the nearest one if there is none such.
    """
    tree = to_dict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected key=value, got {assignment!r}")
        _assign(tree, config, key, text)
    changed: RunConfig = _build(RunConfig, tree, "")
    check_sizes(changed.network)
    return changed


def check_sizes(network: NetworkConfig) -> None:
    """Raise ConfigError unless the network's sizes fit together: it is built, without memory for its weights."""
    try:
        with Weightless():
            build_network(network, s_branch=True)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"network: expected sizes that fit together, got {error}") from error


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _assign(tree: dict[str, Any], config: Any, key: str, text: str) -> None:
    if key in _FILLED_IN:
        raise ConfigError(f"--set {key}: expected a key to be set, got one that {_FILLED_IN[key]}")
    node, owner, parts = tree, config, key.split(".")
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            raise ConfigError(f"--set {key}: unknown key; {nearest(key, _keys(tree))}")
        node, owner = node[part], getattr(owner, part)
    name = parts[-1]
    if name not in node:
        raise ConfigError(f"--set {key}: unknown key; {nearest(key, _keys(tree))}")
    if isinstance(node[name], dict):
        raise ConfigError(f"--set {key}: expected a key of this section, such as {key}.{next(iter(node[name]))}")
    node[name] = _parse(key, text, get_type_hints(type(owner))[name])


def _parse(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(kind) is tuple:
            return [get_args(kind)[0](item) for item in text.strip("()[]").split(",") if item.strip()]
        return kind(text)
    except (ValueError, KeyError) as error:
        name = "comma-separated integers" if get_origin(kind) is tuple else kind.__name__
        raise ConfigError(f"--set {key}: expected {name}, got {text!r}") from error


def _build(cls: Any, tree: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"{path}{key}: unknown key; {nearest(key, hints)}")
    values = {}
    for key, value in tree.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{path}{key}.")
        else:
            values[key] = tuple(value) if get_origin(kind) is tuple else value
    try:
        return cls(**values)
    except LevelError as error:
        raise ConfigError(f"{path}{error}") from error


def _expect(holds: bool, key: str, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in ``tree`` that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _keys(tree: dict[str, Any]) -> list[str]:
    return [key for key, _ in _leaves(tree)]


def nearest(name: str, among: Iterable[str]) -> str:
    """A hint for an unknown ``name``: the closest of ``among``, or all of them."""
    choices = list(among)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(choices)}"
