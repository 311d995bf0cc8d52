"""How many forward passes of the network the steps of training make, and how many operations one has.

A pass backward counts as two forward, one that goes to the input alone as one. Not counted are the last layers, which
are walked back once for each loss, activations that are made again to save memory, and all networks but the teacher,
the student and its average: those of the distance and of the discriminator.
"""

import importlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ctm_fast.models import NetworkConfig, build_network
from ctm_fast.ops import use_reference
from ctm_fast.training.ctm_step import CTMStep, Piece
from ctm_fast.training.hops import rows_asked

FORWARD_AND_BACKWARD = 3
"""Passes that a step of a teacher makes for an image."""


def operations(network: NetworkConfig, *, s_branch: bool) -> int:
    """Floating-point operations of one forward pass for one image: of products and convolutions, as torch counts them.

    A multiplication and an addition are two.
    """
    size = network.img_resolution
    with torch.device("meta"):
        net = build_network(network, s_branch=s_branch)
        x, t = torch.empty(1, network.img_channels, size, size), torch.empty(1)
        labels = torch.empty(1, network.label_dim) if network.label_dim else None
    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)  # it imports Triton
    with use_reference(), torch.no_grad(), counter:
        net(x, t, t if s_branch else None, labels)
    return int(counter.get_total_flops())


def student_passes(step: CTMStep, pieces: Sequence[Piece], *, adversarial: bool) -> int:
    """Forward passes of an image in one update of the student from ``pieces``, its solver's among them.

    A solver's Heun step is two, a jump is one, of those samples alone that it moves.
    """
    at_once = len(pieces) == 1 or step.settings.adaptive_scope == "microbatch"
    return sum(
        _solver(step, piece) + _target(step, piece) + _losses(step, piece, adversarial, at_once) for piece in pieces
    )


def discriminator_passes(step: CTMStep, pieces: Sequence[Piece]) -> int:
    """Forward passes of an image in one update of the discriminator: those that make what it is to judge."""
    assert step.adversary is not None
    jump = step.adversary.fake == "jump"
    return sum(len(piece.x0) + (0 if jump else _rows(step, ~step.estimate_stays(piece))) for piece in pieces)


def _solver(step: CTMStep, piece: Piece) -> int:
    k = len(piece.way) - 1
    return len(piece.x0) * {"teacher": 2 * k, "self": 1, "self-iterated": k}[step.settings.solver]


def _target(step: CTMStep, piece: Piece) -> int:
    if step.settings.target_inner == "none":
        return len(piece.x0)
    return _rows(step, ~piece.stays_u) + _rows(step, ~piece.stays_end)


def _losses(step: CTMStep, piece: Piece, adversarial: bool, at_once: bool) -> int:
    settings, batch = step.settings, len(piece.x0)
    judged = adversarial and step.adversary is not None and step.adversary.fake == "estimate"
    walks = 2 if judged and not at_once else 1
    passes = (1 + 2 * walks) * batch
    if settings.estimate_inner == "student":
        outer = 2 if settings.estimate_outer == "student" else 1
        passes += (1 + (2 if judged else 1) * outer) * _rows(step, ~step.estimate_stays(piece))
    else:
        passes += batch
    if adversarial and not judged:
        passes += FORWARD_AND_BACKWARD * batch
    if settings.dsm_weight > 0:
        passes += FORWARD_AND_BACKWARD * batch
    return passes


def _rows(step: CTMStep, moving: NDArray[np.bool_]) -> int:
    return rows_asked(moving, step.bucket)
