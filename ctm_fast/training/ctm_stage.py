"""The second stage: distil an EDM teacher into a consistency trajectory model, CTM + DSM (arXiv 2310.02279)."""

import copy

import torch
from torch import Tensor

from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.draws import draw_dsm_sigmas, draw_jumps
from ctm_fast.diffusion.ode import solve_heun
from ctm_fast.losses import adaptive_weight, distance, dsm_loss
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser, UNet, student_from_teacher
from ctm_fast.ops import Stream, precond_combine, precond_input
from ctm_fast.training.batches import Batches
from ctm_fast.training.config import CTMConfig, RunConfig
from ctm_fast.training.ema import update_ema
from ctm_fast.training.pullback import accumulate, forward_cut, pull_tail
from ctm_fast.training.regions import Regions
from ctm_fast.training.stage import Stage


def adaptive_layer(net: UNet, name: str) -> Tensor:
    """The weight W at which gradients are compared: ``output`` or ``block`` (see ``CTMConfig``)."""
    return net.out_conv.weight if name == "output" else net.last_block.conv1.weight


class CTMStep:
    """The losses of one batch and their gradients, from given levels and noise.

    Args:
        student, target: theta and its average; ``target`` takes no gradient itself, its input does.
        teacher: the denoiser whose ODE is distilled.
        distance: d(estimate, target) -> [B].
        layer: W, see :func:`adaptive_layer`.
        regions: what is compiled.
    """

    def __init__(
        self,
        student: CTM,
        target: CTM,
        teacher: EDMDenoiser,
        *,
        distance: Distance,
        layer: str,
        sigma_min: float,
        dsm_weight: float,
        regions: Regions,
    ) -> None:
        self.student = student
        self.distance = distance
        self.layer = layer
        self.sigma_min = sigma_min
        self.dsm_weight = dsm_weight
        self.teacher_denoise = regions.compile("teacher", teacher.denoise, repeated=True)
        self.student_jump = regions.compile("student, forward", student.jump)
        self.target_jump = regions.compile("target, forward", target.jump)
        self.target_jump_grad = regions.compile("target, forward and backward", target.jump)
        self.body = regions.compile("student's body, forward and backward", student.net.body)
        self.tail = regions.compile("student's tail, forward and backward", student.net.tail)

    @torch.no_grad()
    def solve(self, x_t: Tensor, way: Tensor, labels: Tensor | None) -> Tensor:
        """x_u: the teacher's Heun steps from way[0] = t to way[-1] = u; ``way`` [k + 1, B]."""
        return solve_heun(lambda x, sigma: self.teacher_denoise(x, sigma, labels), x_t, list(way))

    @torch.no_grad()
    def consistency_target(self, x_u: Tensor, u: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """T = G_target(sg G_student(x_u, u, s), s, sigma_min)."""
        x_s = self.student_jump(x_u, u, s, labels)
        return self.target_jump(x_s, s, torch.full_like(s, self.sigma_min), labels)

    def backward(
        self,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        target: Tensor,
        x0: Tensor,
        sigma: Tensor,
        dsm_noise: Tensor,
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        """Add the gradient of L_CTM + dsm_weight * lambda * L_DSM to the student's ``.grad``.

        L_CTM = mean d(E, target), E = G_target(G_student(x_t, t, s), s, sigma_min); L_DSM is the EDM loss of
        g_student(x0 + sigma noise, sigma, sigma); lambda is :func:`ctm_fast.losses.adaptive_weight`.
        Returns what went into it: ``estimate``, ``ctm_loss`` and ``dsm_loss`` [B], ``lambda_dsm``, ``loss``.
        """
        sigma_data = self.student.sigma_data
        net = self.student.net
        parameters = net.tail_parameters()
        layer = next(
            index for index, parameter in enumerate(parameters) if parameter is adaptive_layer(net, self.layer)
        )

        ctm = forward_cut(
            self.body, self.tail, precond_input(x_t, t, sigma_data=sigma_data, dtype=self.student.dtype), t, s, labels
        )
        x_s = precond_combine(x_t, ctm.F_x, t, s, sigma_data=sigma_data)
        estimate = self.target_jump_grad(x_s, s, torch.full_like(s, self.sigma_min), labels)
        ctm_loss = self.distance(estimate, target)
        ctm_gradients = pull_tail(ctm, ctm_loss.mean(), parameters)

        x_sigma = x0 + sigma.view(-1, 1, 1, 1) * dsm_noise
        x_in = precond_input(x_sigma, sigma, sigma_data=sigma_data, dtype=self.student.dtype)
        dsm = forward_cut(self.body, self.tail, x_in, sigma, sigma, labels)
        D_x = precond_combine(x_sigma, dsm.F_x, sigma, torch.zeros_like(sigma), sigma_data=sigma_data)
        losses = dsm_loss(D_x, x0, sigma, sigma_data=sigma_data)
        dsm_gradients = pull_tail(dsm, losses.mean(), parameters)

        norms = [gradients.parameters[layer].norm() for gradients in (ctm_gradients, dsm_gradients)]
        lambda_dsm = adaptive_weight(*norms, lowest=0.0, highest=1e4)
        weight = self.dsm_weight * lambda_dsm
        accumulate([ctm, dsm], [ctm_gradients, dsm_gradients], [1.0, weight], parameters)
        return {
            "estimate": estimate.detach(),
            "ctm_loss": ctm_loss.detach(),
            "dsm_loss": losses.detach(),
            "lambda_dsm": lambda_dsm,
            "loss": ctm_loss.detach().mean() + weight * losses.detach().mean(),
        }


class CTMStage(Stage):
    """Soft consistency along the teacher's ODE and denoising score matching, RAdam; what is kept is the target."""

    name = "ctm"
    settings: CTMConfig
    model: CTM
    ema: CTM

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        regions: Regions,
        teacher: EDMDenoiser,
    ) -> None:
        self.config = config
        self.settings = config.ctm
        torch.manual_seed(config.stage_seed(self.name))
        teacher = teacher.to(device).eval().requires_grad_(False)
        self.model = student_from_teacher(teacher, s_init=self.settings.s_init).to(device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.RAdam(self.model.parameters(), lr=self.settings.lr, foreach=True)
        self.batches = Batches.of(config, self.name, self.settings.batch, dataset, device)
        self.timer = regions.timer
        self.step = CTMStep(
            self.model,
            self.ema,
            teacher,
            distance=distance(self.settings.distance, c=self.settings.huber_c),
            layer=self.settings.adaptive_layer,
            sigma_min=config.levels.sigma_min,
            dsm_weight=self.settings.dsm_weight,
            regions=regions,
        )

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One update; the terms of the loss, its adaptive weight, and k."""
        settings, seed, batches = self.settings, self.batches.seed, self.batches
        x0, labels = batches.at(step)
        jumps = draw_jumps(
            settings.batch, settings.points, settings.max_solver_steps, self.config.levels, seed=seed, step=step
        )
        way, s = batches.tensor(jumps.way), batches.tensor(jumps.s)
        sigma = batches.tensor(
            draw_dsm_sigmas(settings.batch, self.config.levels, seed=seed, step=step, uniform_to=settings.uniform_to)
        )
        x_t = x0 + way[0].view(-1, 1, 1, 1) * batches.noise(step, x0, Stream.TRAIN)
        with self.timer("teacher"):
            x_u = self.step.solve(x_t, way, labels)
        target = self.step.consistency_target(x_u, way[-1], s, labels)
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.step.backward(x_t, way[0], s, target, x0, sigma, batches.noise(step, x0, Stream.DSM), labels)
        if settings.lr_decay:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * (1 - step / settings.steps)
        self.optimizer.step()
        update_ema(self.ema, self.model, settings.ema)
        return {
            "loss": terms["loss"],
            "ctm_loss": terms["ctm_loss"].mean(),
            "dsm_loss": terms["dsm_loss"].mean(),
            "lambda_dsm": terms["lambda_dsm"],
            "k": torch.tensor(float(jumps.k)),
        }
