"""A CTM step written the published way: what the one that is fast must equal, and what it is timed against.

Gradients at W first, each by a walk of its own through everything behind the network, then the weighted sum is
differentiated from the start; every jump is made, also those that lead nowhere; all graphs live until the end.
"""

import itertools

import torch
from torch import Tensor, nn

from ctm_fast.diffusion.ode import solve_heun
from ctm_fast.losses import adaptive_weight, dsm_loss, weighting
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.training.config import CTMConfig
from ctm_fast.training.ctm_step import Adversary, Piece, adaptive_layer


class NaiveStep:
    """The whole batch at once, on one rank. Arguments as of :class:`ctm_fast.training.ctm_step.CTMStep`."""

    def __init__(
        self,
        student: CTM,
        target: CTM,
        teacher: EDMDenoiser | None,
        *,
        settings: CTMConfig,
        distance: Distance,
        sigma_min: float,
        adversary: Adversary | None = None,
    ) -> None:
        self.student, self.target, self.teacher = student, target, teacher
        self.settings, self.distance, self.sigma_min, self.adversary = settings, distance, sigma_min, adversary

    @torch.no_grad()
    def solve(self, piece: Piece) -> Tensor:
        x, labels = piece.x_t, piece.labels
        if (teacher := self.teacher) is not None:
            return solve_heun(lambda x, sigma: teacher.denoise(x, sigma, labels), x, list(piece.way))
        levels = piece.way[[0, -1]] if self.settings.solver == "self" else piece.way
        for t, t_next in itertools.pairwise(levels):
            x = self.target.jump(x, t, t_next, labels)
        return x

    @torch.no_grad()
    def consistency_target(self, x_u: Tensor, piece: Piece) -> Tensor:
        u, s, end = piece.way[-1], piece.s, torch.full_like(piece.s, self.sigma_min)
        if self.settings.target_inner == "none":
            return self.target.jump(x_u, u, end, piece.labels)
        inner = self.student if self.settings.target_inner == "student-sg" else self.target
        return self.target.jump(inner.jump(x_u, u, s, piece.labels), s, end, piece.labels)

    def estimate(self, piece: Piece) -> Tensor:
        s = piece.way[-1] if self.settings.target_matching else piece.s
        inner = self.target if self.settings.estimate_inner == "target-sg" else self.student
        outer = self.target if self.settings.estimate_outer == "target" else self.student
        x_s = inner.jump(piece.x_t, piece.way[0], s, piece.labels)
        if self.settings.estimate_inner != "student":
            x_s = x_s.detach()
        return outer.jump(x_s, s, torch.full_like(s, self.sigma_min), piece.labels)

    def backward(self, piece: Piece, target: Tensor, *, adversarial: bool = False) -> dict[str, Tensor]:
        """Add the gradient to ``.grad`` of the student; figures as of CTMStep.backward."""
        settings, t, labels = self.settings, piece.way[0], piece.labels
        w = weighting(settings.weighting, sigma_data=self.student.sigma_data, power=settings.weighting_power)
        s = piece.way[-1] if settings.target_matching else piece.s
        estimate = self.estimate(piece)
        losses = {"ctm": (w(t, s) * self.distance(estimate, target)).mean()}
        if settings.dsm_weight > 0:
            x_sigma = piece.x0 + piece.sigma.view(-1, 1, 1, 1) * piece.dsm_noise
            D_x = self.student.denoise(x_sigma, piece.sigma, labels)
            losses["dsm"] = dsm_loss(D_x, piece.x0, piece.sigma, sigma_data=self.student.sigma_data).mean()
        if adversarial:
            assert self.adversary is not None
            fake = estimate
            if self.adversary.fake == "jump":
                fake = self.student.jump(piece.x_t, t, torch.full_like(t, self.sigma_min), labels)
            losses["gan"] = self.adversary.loss.generator(fake, labels, seeds=piece.seeds, step=piece.step).mean()
        layer = adaptive_layer(self.student.net, settings.adaptive_layer)
        total = losses["ctm"]
        lambdas = {}
        for name, (low, high) in {"dsm": (0.0, 1e4), "gan": (0.01, 10.0)}.items():
            if name not in losses:
                continue
            lambdas[name] = torch.ones(())
            if settings.adaptive:
                norms = [
                    torch.autograd.grad(losses[which], layer, retain_graph=True)[0].norm() for which in ("ctm", name)
                ]
                lambdas[name] = adaptive_weight(*norms, lowest=low, highest=high)
            factor = settings.dsm_weight if name == "dsm" else self.adversary.weight  # type: ignore[union-attr]
            total = total + factor * lambdas[name] * losses[name]
        total.backward()
        return {
            "loss": total.detach(),
            **{f"{name}_loss": loss.detach() for name, loss in losses.items()},
            **{f"lambda_{name}": value for name, value in lambdas.items()},
        }

    def discriminator_loss(self, piece: Piece) -> Tensor:
        """The generator's graph is built, and thrown away."""
        assert self.adversary is not None
        fake = self.estimate(piece).detach()
        return self.adversary.loss.judge(fake, piece.x0, piece.labels, seeds=piece.seeds, step=piece.step).loss.mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """``.grad`` of each parameter, taken away; zeros where there is none."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
    module.zero_grad(set_to_none=True)
    return found
