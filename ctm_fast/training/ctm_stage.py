"""The second stage: distil an EDM teacher into a consistency trajectory model, CTM + DSM (arXiv 2310.02279)."""

import torch
from torch import Tensor

from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.draws import draw_dsm_sigmas, draw_jumps
from ctm_fast.distributed import all_mean
from ctm_fast.errors import ConfigError
from ctm_fast.losses import distance
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.ops import Stream
from ctm_fast.training.batches import Batches
from ctm_fast.training.config import CTMConfig, RunConfig
from ctm_fast.training.ctm_step import Adversary, CTMStep, Piece
from ctm_fast.training.execution import Execution
from ctm_fast.training.precision import compute_dtype
from ctm_fast.training.radam import RAdam
from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Stage
from ctm_fast.training.work import student_passes


def distance_of(settings: CTMConfig, device: torch.device) -> Distance:
    """d(estimate, target) as configured; ConfigError or CheckpointError naming the extra or the file it lacks."""
    try:
        return distance(
            settings.distance,
            c=settings.huber_c,
            size=settings.distance_size or None,
            vgg16=settings.vgg16 or None,
            lpips_heads=settings.lpips_heads or None,
            device=device,
        )
    except ConfigError as error:
        raise ConfigError(f"distance: {error}") from error


def _means(gradients: list[Tensor]) -> list[Tensor]:
    return list(all_mean(torch.stack(gradients)).unbind())


class CTMStage(Stage):
    """Soft consistency along an ODE and denoising score matching, RAdam; what is kept is the target network.

    Args:
        student: where it starts, and its target network, too.
        teacher, distance, adversary: see :class:`CTMStep`.
    """

    name = "ctm"
    settings: CTMConfig
    model: CTM
    ema: CTM

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        execution: Execution,
        regions: Regions,
        student: CTM,
        teacher: EDMDenoiser | None,
        distance: Distance,
        *,
        adversary: Adversary | None = None,
    ) -> None:
        settings = config.of_student(self.name)
        torch.manual_seed(config.stage_seed(self.name))
        super().__init__(config, settings, student, execution)
        if teacher is not None:
            teacher = teacher.to(execution.device).eval().requires_grad_(False)
            teacher.dtype = compute_dtype(settings.solver_precision)
            teacher.net = self.placement.place_frozen(teacher.net, teacher.dtype)
        self.optimizer = RAdam(self.placement.groups(self.model), lr=settings.lr)
        self.batches = Batches.of(config, self.name, settings.batch, dataset, execution.device)
        self.timer = regions.timer
        self.step = CTMStep(
            self.model,
            self.ema,
            teacher,
            settings=settings,
            distance=distance,
            sigma_min=config.levels.sigma_min,
            regions=regions,
            adversary=adversary,
            average=_means,
            bucket=regions.bucket(max(p.stop - p.start for p in self.pieces)),
            scale=self.scale,
        )

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update; the terms of the loss, their adaptive weights, and k."""
        return self.move_student(step, adversarial=False)

    def move_student(self, step: int, *, adversarial: bool) -> dict[str, Tensor]:
        """One update of the student, and of its averages."""
        pieces, k = self.draw(step)
        targets = []
        for piece, positions in zip(pieces, self.pieces, strict=True):
            self.seed_dropout(step, positions)
            with self.timer("teacher"):
                x_u = self.step.solve(piece.x_t, piece.way, piece.labels)
            targets.append((piece, self.step.consistency_target(x_u, piece)))
        terms = self.step.backward(targets, adversarial=adversarial)
        self.passes += student_passes(self.step, pieces, adversarial=adversarial)
        if self.settings.lr_decay:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * (1 - step / self.settings.steps)
        figures = {name: value.mean() for name, value in terms.items() if name != "estimate"}
        return self.update(step, {**figures, "k": pieces[0].x0.new_full((), float(k))})

    def draw(self, step: int) -> tuple[list[Piece], int]:
        """The pieces of this rank's share of batch number ``step``, and k."""
        settings, batches, levels = self.settings, self.batches, self.config.levels
        may_stay = not self.execution.fsdp  # a sharded network is called by all ranks or by none
        pieces = []
        for positions in self.pieces:
            jumps = draw_jumps(
                positions,
                settings.points,
                settings.max_solver_steps,
                levels,
                seed=batches.seed,
                step=step,
                k_strategy=settings.k_strategy,
                k_power=settings.k_power,
                s_strategy=settings.s_strategy,
            )
            sigma = draw_dsm_sigmas(
                positions,
                levels,
                seed=batches.seed,
                step=step,
                law=settings.dsm_law,
                uniform_to=settings.uniform_to,
            )
            with self.timer("data"):
                x0, labels = batches.at(step, positions)
            pieces.append(
                Piece(
                    x0=x0,
                    noise=batches.noise(step, x0, Stream.TRAIN, positions),
                    way=batches.tensor(jumps.way),
                    s=batches.tensor(jumps.s),
                    stays_u=may_stay & (jumps.s == jumps.u),
                    stays_end=may_stay & (jumps.s == levels.sigma_min),
                    sigma=batches.tensor(sigma),
                    dsm_noise=batches.noise(step, x0, Stream.DSM, positions),
                    labels=labels,
                    seeds=batches.seeds(positions),
                    step=step,
                    dropout_seed=(self.dropout_seed(step, positions) + 1) % 2**32,  # not the masks of the target
                )
            )
        return pieces, jumps.k
