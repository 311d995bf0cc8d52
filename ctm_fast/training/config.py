"""What a run is: frozen dataclasses, every key with its range.

Everything here changes the result of a run and is written into each of its files. What does not (device, ranks,
threads, micro-batches, compilation, where it is written) is an argument of the command line.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ctm_fast.data import MAX_CLASSES
from ctm_fast.diffusion.draws import DSM_LAWS, K_STRATEGIES, S_STRATEGIES
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.losses import ALL_DISTANCES, WEIGHTINGS
from ctm_fast.models import ARCHITECTURES, S_INITS, NetworkConfig, build_network
from ctm_fast.models.unet import Weightless
from ctm_fast.training.averages import parse_average

STAGES = ("teacher", "ctm", "gan")
SOLVERS = ("teacher", "self", "self-iterated")
ESTIMATE_INNER = ("student", "student-sg", "target-sg")
ESTIMATE_OUTER = ("target", "student")
TARGET_INNER = ("student-sg", "target-sg", "none")
SCOPES = ("global", "microbatch")
PRECISIONS = ("fp32", "bf16", "fp16")
FAKES = ("estimate", "jump")
FEATURES = ("efflite0", "deit", "indomain")


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
    """Rate of the average that is kept."""
    emas: tuple[str, ...] = ()
    """Further averages that are kept: rates such as 0.9999, or power:0.05 (see ``training/averages.py``)."""
    p_mean: float = -1.2
    p_std: float = 1.2


@dataclass(frozen=True)
class CTMConfig:
    """CTM + DSM (arXiv 2310.02279): RAdam, an EMA that is also the target network.

        E = G_outer(G_inner(x_t, t, s), s, sigma_min)      the estimate
        T = G_target(sg G_inner(x_u, u, s), s, sigma_min)  what it is to be, x_u being the solver's
        L = mean w(t, s) d(E, T) + dsm_weight lambda_dsm L_DSM

    Two configurations of it: CTM as published (the defaults), and consistency distillation (``s_strategy`` smallest,
    ``target_inner`` target-sg, ``dsm_weight`` 0).
    """

    steps: int = 1000
    batch: int = 64
    """Samples of a step, over all ranks and micro-batches."""
    lr: float = 4e-4
    lr_decay: bool = False
    """Whether the learning rate falls linearly to 0 over the steps."""
    ema: float = 0.999
    """Rate of the target network, which is what is kept."""
    emas: tuple[str, ...] = ()
    """Further averages that are kept: rates such as 0.9999, or power:0.05 (see ``training/averages.py``)."""
    points: int = 18
    """N: points of the training grid."""
    max_solver_steps: int = 17
    """M: the solver takes k in 1..M steps from t to u."""
    k_strategy: str = "weighted"
    """``weighted``: P(k) proportional to k^k_power; ``uniform``; ``fixed``: k = M."""
    k_power: float = 1.0
    s_strategy: str = "uniform"
    """``uniform`` over the grid's levels up to u, or ``smallest``: s = sigma_min, a consistency model."""
    solver: str = "teacher"
    """Where x_u comes from: ``teacher``'s Heun steps; ``self``: one jump of the target network from t to u;
    ``self-iterated``: its jumps through the grid. The last two need no teacher."""
    estimate_inner: str = "student"
    """Who makes the estimate's jump t -> s: ``student``, or without a gradient ``student-sg`` or ``target-sg``."""
    estimate_outer: str = "target"
    """Who takes it on to sigma_min: ``target``, with a gradient to its input, or ``student``."""
    target_inner: str = "student-sg"
    """Who makes the target's jump u -> s: ``student-sg``, ``target-sg``; ``none``: it goes to sigma_min at once."""
    target_matching: bool = False
    """Whether the estimate jumps to u, instead of to s."""
    weighting: str = "uniform"
    """w(t, s), see :func:`ctm_fast.losses.weighting`."""
    weighting_power: float = 1.0
    distance: str = "pseudo-huber"
    distance_size: int = 224
    """What a perceptual distance resizes images to; 0: they stay as they are."""
    huber_c: float = 0.03
    vgg16: str = ""
    """The file of VGG16's weights, for lpips."""
    lpips_heads: str = ""
    """The file of LPIPS' weights, for lpips."""
    dsm_weight: float = 1.0
    dsm_law: str = "half-lognormal"
    """``half-lognormal``, or ``lognormal`` as EDM's teachers."""
    uniform_to: float = 0.7
    """half-lognormal draws the levels of the other half from the first ``uniform_to`` of the schedule."""
    adaptive: bool = True
    """Whether lambda is taken from gradients at W; otherwise it is 1."""
    adaptive_layer: str = "output"
    """W: ``output`` (output convolution, published for CIFAR-10) or ``block`` (second convolution of the last block,
    published for ImageNet)."""
    adaptive_scope: str = "global"
    """Whose gradients are compared at W: their means over the whole batch (``global``), or each micro-batch's own on
    each rank (``microbatch``, published), so that a run depends on how a batch is split."""
    s_init: str = "zero"
    """How the student's s-branch starts: ``zero``, so that it starts as its teacher, or ``published``, random."""
    solver_precision: str = "fp32"
    """What the teacher computes in; bf16 is faster, and no longer exact."""


@dataclass(frozen=True)
class GANConfig(CTMConfig):
    """CTM + DSM + adversarial (arXiv 2310.02279, Sec. 4): even steps move the student, odd ones the discriminator."""

    features: tuple[str, ...] = ("efflite0",)
    """Frozen feature networks: ``efflite0``, ``deit``, or ``indomain``, a classifier trained on the data."""
    features_size: int = 224
    """What images are resized to for them; DeiT's are always 224."""
    deit: str = ""
    """The file of DeiT's weights."""
    start: int = 0
    """Steps before the adversarial loss joins in."""
    gan_weight: float = 1.0
    discriminator_lr: float = 2e-3
    discriminator_width: int = 64
    """Channels of the finest projected map."""
    conditional: bool = False
    """Whether the discriminator sees the labels (projection); the published one does not."""
    fake: str = "estimate"
    """What it judges: CTM's ``estimate`` (published), or the student's ``jump`` from t to sigma_min."""
    augment: bool = True
    """DiffAugment of what it is shown."""
    same_augment: bool = False
    """Whether real and generated images share their draws."""
    r1: float = 0.0
    """Weight of the gradient penalty on real images."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run: two runs of equal configuration on one machine are equal. Raises ConfigError naming the key."""

    preset: str = "digits"
    seed: int = 0
    stages: tuple[str, ...] = ("teacher", "ctm")
    """A stretch of ``teacher, ctm, gan``."""
    data_sha256: str = ""
    """Of the images and labels that were read; filled in by the run."""
    teacher_sha256: str = ""
    """Of the file given as ``--teacher``, filled in by the run; empty if it trains its own."""
    student_sha256: str = ""
    """Of the file given as ``--student``, filled in by the run; empty if it starts from the teacher."""
    sigma_data: float = 0.5
    precision: str = "auto"
    """What the network computes in: fp32, bf16 or fp16; ``auto``, which the run resolves, is bf16 on a GPU, fp32 on a
    CPU. Weights, losses and preconditioning stay in float32."""
    data: DataConfig = field(default_factory=DataConfig)
    levels: Levels = field(default_factory=Levels)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    ctm: CTMConfig = field(default_factory=CTMConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    snapshot_every: int = 500
    """Steps between two saves of state and snapshot; the last step of a stage is always saved."""
    preview_kimg: float = 0.0
    """Thousands of images between two sample grids; 0: one with each snapshot."""
    evaluate_kimg: float = 0.0
    """Thousands of images between two evaluations of the average that is kept; 0: none before the report."""
    log_every: int = 20
    max_skipped: int = 20
    """So many steps in a row whose figures are not finite end the run; fewer are left out and counted."""

    def __post_init__(self) -> None:
        for key, value in leaves(dataclasses.asdict(self)):
            _expect(not isinstance(value, float) or math.isfinite(value), key, "a finite number", value)
        names_a_directory = re.fullmatch(r"[A-Za-z0-9_.-]+", self.preset) is not None
        _expect(names_a_directory, "preset", "letters, digits, dots, dashes", self.preset)
        _expect(0 <= self.seed < 2**29, "seed", "0 <= seed < 2^29", self.seed)
        _expect(self.stages in _STRETCHES, "stages", "a stretch of teacher,ctm,gan", self.stages)
        _expect(self.sigma_data > 0, "sigma_data", "a positive number", self.sigma_data)
        _expect(
            self.precision in ("auto", *PRECISIONS), "precision", f"auto or {' or '.join(PRECISIONS)}", self.precision
        )
        _expect(1 <= self.levels.rho <= 100, "levels.rho", "1 <= rho <= 100", self.levels.rho)
        for key in ("snapshot_every", "log_every", "max_skipped"):
            _expect(getattr(self, key) > 0, key, "a positive number", getattr(self, key))
        for key in ("preview_kimg", "evaluate_kimg"):
            _expect(getattr(self, key) >= 0, key, "a number not below 0", getattr(self, key))
        for name in STAGES:
            _check_training(name, getattr(self, name))
        _expect(self.teacher.p_std > 0, "teacher.p_std", "a positive number", self.teacher.p_std)
        for name in STAGES[1:]:
            _check_ctm(name, getattr(self, name))
        _check_gan(self.gan)
        labelled = self.data.conditional or not self.gan.conditional
        _expect(labelled, "gan.conditional", "false where data.conditional is", self.gan.conditional)
        _expect(
            not (self.gan.conditional and self.network.label_dropout),
            "gan.conditional",
            "false where network.label_dropout drops labels",
            self.gan.conditional,
        )
        _expect(
            self.data.conditional == (self.network.label_dim > 0),
            "network.label_dim",
            "the number of classes if data.conditional, else 0",
            self.network.label_dim,
        )
        _check_network(self.network)

    @property
    def needs_teacher(self) -> bool:
        """Whether a stage of it follows a teacher's ODE."""
        return any(self.of_student(name).solver == "teacher" for name in self.stages if name != "teacher")

    def of_student(self, stage: str) -> CTMConfig:
        """The settings of ``ctm`` or ``gan``."""
        return self.ctm if stage == "ctm" else self.gan

    def steps(self, stage: str) -> int:
        """How many steps ``stage`` takes."""
        settings: TeacherConfig | CTMConfig = getattr(self, stage)
        return settings.steps

    def stage_seed(self, stage: str) -> int:
        """The seed of everything that ``stage`` draws: another one for each stage, below 2^31."""
        return 4 * self.seed + STAGES.index(stage)


_STRETCHES = tuple(STAGES[i:j] for i in range(len(STAGES)) for j in range(i + 1, len(STAGES) + 1))


def _check_training(name: str, stage: TeacherConfig | CTMConfig) -> None:
    """What all stages have in common."""
    _expect(0 < stage.steps < 2**31, f"{name}.steps", "0 < steps < 2^31", stage.steps)
    _expect(0 < stage.batch <= 2**20, f"{name}.batch", "0 < batch <= 2^20", stage.batch)
    _expect(stage.lr > 0, f"{name}.lr", "a positive number", stage.lr)
    _expect(0 <= stage.ema < 1, f"{name}.ema", "0 <= ema < 1", stage.ema)
    _expect(len(set(stage.emas)) == len(stage.emas), f"{name}.emas", "different averages", stage.emas)
    for average in stage.emas:
        try:
            parse_average(average)
        except ConfigError as error:
            raise ConfigError(f"{name}.emas: {error}") from error


def _check_ctm(name: str, ctm: CTMConfig) -> None:
    for key, choices in (
        ("k_strategy", K_STRATEGIES),
        ("s_strategy", S_STRATEGIES),
        ("solver", SOLVERS),
        ("estimate_inner", ESTIMATE_INNER),
        ("estimate_outer", ESTIMATE_OUTER),
        ("target_inner", TARGET_INNER),
        ("weighting", WEIGHTINGS),
        ("distance", ALL_DISTANCES),
        ("dsm_law", DSM_LAWS),
        ("adaptive_layer", ("output", "block")),
        ("adaptive_scope", SCOPES),
        ("s_init", S_INITS),
        ("solver_precision", PRECISIONS),
    ):
        value = getattr(ctm, key)
        _expect(value in choices, f"{name}.{key}", " or ".join(choices), value)
    _expect(2 <= ctm.points <= 10_000, f"{name}.points", "2 <= points <= 10000", ctm.points)
    _expect(
        1 <= ctm.max_solver_steps < ctm.points,
        f"{name}.max_solver_steps",
        f"1 <= max_solver_steps < {name}.points = {ctm.points}",
        ctm.max_solver_steps,
    )
    learns = ctm.estimate_inner == "student" or ctm.estimate_outer == "student"
    _expect(learns, f"{name}.estimate_outer", "student where estimate_inner is not, so that it learns", "target")
    _expect(abs(ctm.k_power) <= 64, f"{name}.k_power", "-64 to 64", ctm.k_power)
    _expect(abs(ctm.weighting_power) <= 8, f"{name}.weighting_power", "-8 to 8", ctm.weighting_power)
    _expect(0 <= ctm.distance_size <= 1024, f"{name}.distance_size", "0 to 1024", ctm.distance_size)
    _expect(ctm.huber_c > 0, f"{name}.huber_c", "a positive number", ctm.huber_c)
    _expect(ctm.dsm_weight >= 0, f"{name}.dsm_weight", "a number not below 0", ctm.dsm_weight)
    _expect(0 < ctm.uniform_to <= 1, f"{name}.uniform_to", "0 < uniform_to <= 1", ctm.uniform_to)


def _check_gan(gan: GANConfig) -> None:
    known = len(gan.features) > 0 and all(name in FEATURES or name.startswith("user:") for name in gan.features)
    _expect(known, "gan.features", f"some of {', '.join(FEATURES)}", gan.features)
    _expect(8 <= gan.features_size <= 1024, "gan.features_size", "8 to 1024", gan.features_size)
    _expect(gan.fake in FAKES, "gan.fake", " or ".join(FAKES), gan.fake)
    _expect(1 <= gan.discriminator_width <= 1024, "gan.discriminator_width", "1 to 1024", gan.discriminator_width)
    _expect(gan.discriminator_lr > 0, "gan.discriminator_lr", "a positive number", gan.discriminator_lr)
    _expect(gan.gan_weight > 0, "gan.gan_weight", "a positive number", gan.gan_weight)
    for key in ("start", "r1"):
        _expect(getattr(gan, key) >= 0, f"gan.{key}", "a number not below 0", getattr(gan, key))


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


def _expect(holds: bool, key: str, expected: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in ``tree`` that is not a section."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(name: str, among: Iterable[str]) -> str:
    """A hint for an unknown ``name``: the closest of ``among``, or all of them."""
    choices = list(among)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(choices)}"
