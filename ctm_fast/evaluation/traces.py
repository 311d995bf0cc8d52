"""The trace of a denoiser's Jacobian dD/dx: by unit vectors exactly, or by random probes (Hutchinson)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ctm_fast.ops import Stream, philox_normal

Probes = Literal["rademacher", "gaussian", "exact"]
Mode = Literal["reverse", "forward"]


def draw_probes(seeds: Tensor, shape: Sequence[int], *, kind: Probes, count: int) -> Tensor:
    """[K, B, n] float64: K probes for each sample, functions of its seed alone; unit vectors for "exact"."""
    n = math.prod(shape)
    if kind == "exact":
        unit = torch.eye(n, dtype=torch.float64, device=seeds.device)
        return unit[:, None, :].expand(n, len(seeds), n)
    draws = [philox_normal(seeds, k, shape, stream=Stream.PROBE).flatten(1).double() for k in range(count)]
    probes = torch.stack(draws)
    return probes if kind == "gaussian" else torch.where(probes < 0, -1.0, 1.0).double()


def quadratic_forms(
    function: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor, *, mode: Mode = "reverse"
) -> tuple[Tensor, Tensor]:
    """D(x) and e^T (dD/dx) e for each probe e; its mean over random probes is the trace.

    Args:
        function: x -> D(x), like x.
        x: [B, C, H, W].
        probes: [K, B, n].
        mode: "reverse" takes one pass and K backward ones, "forward" K passes with tangents, for functions whose every
            op has a forward-mode derivative: for a network, under :func:`ctm_fast.ops.use_reference`.

    Returns:
        D(x) like x, and [B, K] float64; neither has a gradient.

    Raises NotImplementedError in mode "forward" for an op without such a derivative: there are no silent zeros.
    """
    with torch.enable_grad():
        # In forward mode too: an op that knows reverse mode alone drops the tangents of what asks for no gradient, and
        # raises where one is asked for.
        leaf = x.detach().requires_grad_()
        tangents = probes.view(len(probes), *x.shape)
        return (_reverse if mode == "reverse" else _forward)(function, leaf, tangents)


def _reverse(function: Callable[[Tensor], Tensor], leaf: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    D_x = function(leaf)
    forms = []
    for k, probe in enumerate(probes):
        last = k + 1 == len(probes)
        (pulled,) = torch.autograd.grad(D_x, leaf, probe.to(D_x.dtype), retain_graph=not last)
        forms.append(_product(pulled, probe))
    return D_x.detach(), torch.stack(forms, 1)


def _forward(function: Callable[[Tensor], Tensor], leaf: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    forms = []
    for probe in probes:
        with forward_ad.dual_level():
            D_x, pushed = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, probe.to(leaf.dtype))))
        if pushed is None:
            raise NotImplementedError("mode: expected a function of its argument for forward mode, got no tangent")
        forms.append(_product(pushed.detach(), probe))
    return D_x.detach(), torch.stack(forms, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b).flatten(1).sum(1)
