"""The losses of a CTM step, CTM + DSM + adversarial (arXiv 2310.02279, Eqs. 9, 10 and 13), and their gradients."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctm_fast.diffusion.ode import solve_heun
from ctm_fast.losses import AdversarialLoss, Judgement, adaptive_weight, dsm_loss, weighting
from ctm_fast.losses.distance import Distance
from ctm_fast.models import CTM, EDMDenoiser, UNet
from ctm_fast.ops import precond_combine, precond_input
from ctm_fast.training.config import CTMConfig
from ctm_fast.training.hops import jump_rows
from ctm_fast.training.pullback import CutForward, GradientStore, Pulled, forward_cut, pull_tail, walk_back
from ctm_fast.training.regions import Regions

CLIPS = {"dsm": (0.0, 1e4), "gan": (0.01, 10.0)}
"""Published ranges of the adaptive weights."""

Average = Callable[[list[Tensor]], list[Tensor]]


def adaptive_layer(net: UNet, name: str) -> Tensor:
    """The weight W at which gradients are compared: ``output`` or ``block`` (see ``CTMConfig``)."""
    return net.out_conv.weight if name == "output" else net.last_block.conv1.weight


@dataclass(frozen=True)
class Piece:
    """What a step knows of some of its samples: images, levels, noise, all that was drawn.

    ``way`` [k + 1, B] leads the solver from t = way[0] to u = way[k]; ``stays_u`` and ``stays_end`` [B] say, on the
    host, where s = u and where s = sigma_min, so that no network need be asked (False where it is to be, though).
    ``seeds`` [B] and ``step`` are those of augmentations; ``dropout_seed`` starts torch's generator for the passes that
    are walked back.
    """

    x0: Tensor
    noise: Tensor
    way: Tensor
    s: Tensor
    stays_u: NDArray[np.bool_]
    stays_end: NDArray[np.bool_]
    sigma: Tensor
    dsm_noise: Tensor
    labels: Tensor | None
    seeds: Tensor
    step: int
    dropout_seed: int = 0

    @property
    def x_t(self) -> Tensor:
        """The images at the levels t."""
        return self.x0 + _image(self.way[0]) * self.noise


@dataclass(frozen=True)
class Adversary:
    """The third loss, its weight, and what is judged: see ``GANConfig.fake``."""

    loss: AdversarialLoss
    weight: float = 1.0
    fake: str = "estimate"


class CTMStep:
    """The gradients of a batch, in one piece or several, from given levels and noise.

    Args:
        student, target: theta and its average; ``target`` takes no gradient itself, its input does.
        teacher: the denoiser whose ODE is distilled; None where ``settings.solver`` needs none.
        settings: which networks make estimate and target, the weights; see :class:`CTMConfig`.
        distance: d(estimate, target) -> [B].
        regions: what is compiled.
        adversary: the third loss; None without.
        average: gradients [...] -> their means over ranks; of W's, where the adaptive weight is global.
        bucket: see :func:`ctm_fast.training.hops.jump_rows`.
        scale: loss -> loss times the scale of its gradients, for float16.
    """

    def __init__(
        self,
        student: CTM,
        target: CTM,
        teacher: EDMDenoiser | None,
        *,
        settings: CTMConfig,
        distance: Distance,
        sigma_min: float,
        regions: Regions,
        adversary: Adversary | None = None,
        average: Average = lambda gradients: gradients,
        bucket: int = 1,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        self.student = student
        self.settings = settings
        self.distance = distance
        self.weighting = weighting(settings.weighting, sigma_data=student.sigma_data, power=settings.weighting_power)
        self.sigma_min = sigma_min
        self.adversary = adversary
        self.average = average
        self.bucket = bucket
        self.scale = scale
        self.parameters = list(student.parameters())
        self.tail_parameters = student.net.tail_parameters()
        layer = adaptive_layer(student.net, settings.adaptive_layer)
        self.layer = next(i for i, parameter in enumerate(self.tail_parameters) if parameter is layer)
        if teacher is not None:
            self.teacher_denoise = regions.compile("teacher", teacher.denoise, repeated=True)
            self.captured_solver = regions.captured(self.teacher_denoise)
        self.student_jump = regions.compile("student, forward", student.jump)
        self.target_jump = regions.compile("target, forward", target.jump)
        outer = target if settings.estimate_outer == "target" else student
        self.outer_jump = regions.compile("outer jump, forward and backward", outer.jump)
        self.body = regions.compile("student's body, forward and backward", student.net.body)
        self.tail = regions.compile("student's tail, forward and backward", student.net.tail)

    @torch.no_grad()
    def solve(self, x_t: Tensor, way: Tensor, labels: Tensor | None) -> Tensor:
        """x_u: from way[0] = t to way[-1] = u by the teacher's Heun steps, or by jumps of the target network."""
        if self.settings.solver == "teacher":
            if self.captured_solver is not None:
                return self.captured_solver(x_t, list(way), labels)
            return solve_heun(lambda x, sigma: self.teacher_denoise(x, sigma, labels), x_t, list(way))
        levels = list(way) if self.settings.solver == "self-iterated" else [way[0], way[-1]]
        for t, t_next in itertools.pairwise(levels):
            x_t = self.target_jump(x_t, t, t_next, labels)
        return x_t

    @torch.no_grad()
    def consistency_target(self, x_u: Tensor, piece: Piece) -> Tensor:
        """T = G_target(sg G_student(x_u, u, s), s, sigma_min)."""
        u, s, labels = piece.way[-1], piece.s, piece.labels
        end = torch.full_like(s, self.sigma_min)
        if self.settings.target_inner == "none":
            return self.target_jump(x_u, u, end, labels)
        inner = self.student_jump if self.settings.target_inner == "student-sg" else self.target_jump
        x_s = jump_rows(inner, x_u, u, s, labels, ~piece.stays_u, bucket=self.bucket)
        return jump_rows(self.target_jump, x_s, s, end, labels, ~piece.stays_end, bucket=self.bucket)

    def backward(self, pieces: Sequence[tuple[Piece, Tensor]], *, adversarial: bool = False) -> dict[str, Tensor]:
        """Add the gradient of L to ``.grad``.

            L = mean w d(E, T) + dsm_weight lambda_dsm L_DSM + gan_weight lambda_gan L_G

        ``pieces`` are those of this rank's share of the batch, each with its consistency target T; the gradient is that
        of means over the share. With one piece, or weights of each piece's own, CTM's and the adversarial loss are
        walked back at once.

        Returns what went into it: ``estimate``, ``ctm_loss``, ``dsm_loss`` (and ``gan_loss``) of the share's samples,
        the weights ``lambda_*``, and ``loss``.
        """
        count = sum(len(piece.x0) for piece, _ in pieces)
        at_once = len(pieces) == 1 or self.settings.adaptive_scope == "microbatch"
        stores = {name: GradientStore(self.parameters) for name in ("ctm", "dsm", "gan")}
        terms: dict[str, list[Tensor]] = {}
        lambdas: dict[str, Tensor] = {}
        for piece, target in pieces:
            torch.manual_seed(piece.dropout_seed)
            if self.settings.dsm_weight > 0:
                # Walked back first, so that its activations are gone before those of the longer way are there.
                with stores["dsm"].collecting():
                    walk_back([self._pull_dsm(piece, count, terms)], [1.0], self.tail_parameters)
            pulled = self._pull_ctm(piece, target, count, adversarial, terms)
            if at_once:
                share = len(piece.x0) / count
                at_layer = {name: one.at(self.tail_parameters, self.layer) for name, one in pulled.items()}
                at_layer |= self._at_layer(stores)
                # Of the piece's own means: the published weight adds 1e-4 to the norm of one.
                own = self._lambdas({name: gradient / share for name, gradient in at_layer.items()})
                weights = [self._weight(name, own) for name in pulled]
                walk_back(list(pulled.values()), weights, self.tail_parameters)
                stores["dsm"].release(self._weight("dsm", own))
                lambdas = {name: lambdas.get(name, 0) + share * value for name, value in own.items()}
            else:
                for name, one in pulled.items():
                    shared = name == "ctm" and "gan" in pulled and pulled["gan"].forward is one.forward
                    with stores[name].collecting():
                        walk_back([one], [1.0], self.tail_parameters, again=shared)
        if not at_once:
            lambdas = self._lambdas(self._at_layer(stores))
            for name, store in stores.items():
                store.release(self._weight(name, lambdas))
        return self._figures(terms, lambdas)

    @torch.no_grad()
    def fake(self, piece: Piece) -> Tensor:
        """What the discriminator is to judge, without a graph: see ``GANConfig.fake``."""
        t, s, labels = piece.way[0], self._estimate_level(piece), piece.labels
        end = torch.full_like(s, self.sigma_min)
        assert self.adversary is not None
        if self.adversary.fake == "jump":
            return self.student_jump(piece.x_t, t, end, labels)
        inner = self.target_jump if self.settings.estimate_inner == "target-sg" else self.student_jump
        outer = self.target_jump if self.settings.estimate_outer == "target" else self.student_jump
        x_s = inner(piece.x_t, t, s, labels)
        return jump_rows(outer, x_s, s, end, labels, ~self.estimate_stays(piece), bucket=self.bucket)

    def judge(self, piece: Piece) -> Judgement:
        """The discriminator's loss on generated and real images."""
        assert self.adversary is not None
        return self.adversary.loss.judge(self.fake(piece), piece.x0, piece.labels, seeds=piece.seeds, step=piece.step)

    def estimate_stays(self, piece: Piece) -> NDArray[np.bool_]:
        """Where the estimate's outer jump is the identity: it is at sigma_min already."""
        matching = self.settings.target_matching
        return piece.stays_u & piece.stays_end if matching else piece.stays_end

    def _pull_dsm(self, piece: Piece, count: int, terms: dict[str, list[Tensor]]) -> Pulled:
        """Denoising score matching, walked back to the cut of its forward pass; its figures go to ``terms``."""
        x_sigma = piece.x0 + _image(piece.sigma) * piece.dsm_noise
        forward, D_x = self._student(x_sigma, piece.sigma, piece.sigma, piece.labels, denoise=True)
        losses = dsm_loss(D_x, piece.x0, piece.sigma, sigma_data=self.student.sigma_data)
        terms.setdefault("dsm_loss", []).append(losses.detach())
        return pull_tail(forward, self._gradient(losses, forward.F_x, count), self.tail_parameters)

    def _pull_ctm(
        self, piece: Piece, target: Tensor, count: int, adversarial: bool, terms: dict[str, list[Tensor]]
    ) -> dict[str, Pulled]:
        """The losses of the estimate, each walked back to the cut of its forward pass; figures go to ``terms``."""
        t, s, labels = piece.way[0], self._estimate_level(piece), piece.labels
        x_t, end = piece.x_t, torch.full_like(s, self.sigma_min)
        if self.settings.estimate_inner == "student":
            ctm, x_s = self._student(x_t, t, s, labels)
            moves = ~self.estimate_stays(piece)
            estimate = jump_rows(self.outer_jump, x_s, s, end, labels, moves, bucket=self.bucket)
        else:
            inner = self.target_jump if self.settings.estimate_inner == "target-sg" else self.student_jump
            with torch.no_grad():
                x_s = inner(x_t, t, s, labels)
            ctm, estimate = self._student(x_s, s, end, labels)
        second = self.settings.estimate_inner == self.settings.estimate_outer == "student"
        others = self.parameters if second else []

        def through(gradient: Tensor, again: bool) -> Pulled:
            at_F, *direct = torch.autograd.grad(
                estimate, [ctm.F_x, *others], gradient, retain_graph=again, allow_unused=True
            )
            found = [(p, grad) for p, grad in zip(others, direct, strict=True) if grad is not None]
            return pull_tail(ctm, at_F, self.tail_parameters, direct=found, again=again)

        judged = adversarial and self.adversary is not None and self.adversary.fake == "estimate"
        leaf = estimate.detach().requires_grad_()
        losses = self.weighting(t, s) * self.distance(leaf, target)
        pulled = {"ctm": through(self._gradient(losses, leaf, count), again=judged)}
        terms.setdefault("estimate", []).append(estimate.detach())
        terms.setdefault("ctm_loss", []).append(losses.detach())
        if adversarial and self.adversary is not None:
            if not judged:
                jump, estimate = self._student(x_t, t, end, labels)
                leaf = estimate.detach().requires_grad_()
            losses = self.adversary.loss.generator(leaf, labels, seeds=piece.seeds, step=piece.step)
            gradient = self._gradient(losses, leaf, count)
            if judged:
                pulled["gan"] = through(gradient, again=False)
            else:
                (at_F,) = torch.autograd.grad(estimate, jump.F_x, gradient)
                pulled["gan"] = pull_tail(jump, at_F, self.tail_parameters)
            terms.setdefault("gan_loss", []).append(losses.detach())
        return pulled

    def _student(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, *, denoise: bool = False
    ) -> tuple[CutForward, Tensor]:
        """A pass of the student, cut, and G(x, t, s) of it, or g(x, t, s) to ``denoise``."""
        sigma_data = self.student.sigma_data
        x_in = precond_input(x, t, sigma_data=sigma_data, dtype=self.student.dtype)
        forward = forward_cut(self.body, self.tail, x_in, t, s, labels)
        to = torch.zeros_like(s) if denoise else s
        return forward, precond_combine(x, forward.F_x, t, to, sigma_data=sigma_data)

    def _gradient(self, losses: Tensor, leaf: Tensor, count: int) -> Tensor:
        """Of the sum of ``losses`` [B] over ``count``, scaled, at ``leaf``."""
        (gradient,) = torch.autograd.grad(self.scale(losses.sum() / count), leaf)
        return gradient

    def _estimate_level(self, piece: Piece) -> Tensor:
        return piece.way[-1] if self.settings.target_matching else piece.s

    def _at_layer(self, stores: dict[str, GradientStore]) -> dict[str, Tensor]:
        """The gradients at W of the losses that have been stored."""
        layer = self.tail_parameters[self.layer]
        return {name: gradient for name, store in stores.items() if (gradient := store.of(layer)) is not None}

    def _lambdas(self, at_layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adaptive weight of each loss but CTM's, from the gradients at W."""
        names = [name for name in at_layer if name != "ctm"]
        if not self.settings.adaptive:
            return {name: at_layer[name].new_ones(()) for name in names}
        gradients = [at_layer[name] for name in ("ctm", *names)]
        if self.settings.adaptive_scope == "global":
            gradients = self.average(gradients)
        one = self.scale(gradients[0].new_ones(()))  # the weight is not to depend on a loss scale
        norm, *norms = (gradient.norm() / one for gradient in gradients)
        return {
            name: adaptive_weight(norm, other, lowest=CLIPS[name][0], highest=CLIPS[name][1]).float()
            for name, other in zip(names, norms, strict=True)
        }

    def _weight(self, name: str, lambdas: dict[str, Tensor]) -> Tensor | float:
        if name not in lambdas:
            return 1.0
        if name == "dsm":
            return self.settings.dsm_weight * lambdas[name]
        assert self.adversary is not None
        return self.adversary.weight * lambdas[name]

    def _figures(self, terms: dict[str, list[Tensor]], lambdas: dict[str, Tensor]) -> dict[str, Tensor]:
        figures = {name: torch.cat(values) for name, values in terms.items()}
        loss = figures["ctm_loss"].mean()
        for name in lambdas:
            loss = loss + self._weight(name, lambdas) * figures[f"{name}_loss"].mean()
        return {**figures, **{f"lambda_{name}": value for name, value in lambdas.items()}, "loss": loss}


def _image(levels: Tensor) -> Tensor:
    return levels.view(-1, 1, 1, 1)
