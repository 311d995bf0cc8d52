"""Weights of losses: of a sample by its levels, and of whole losses by how hard they pull on a chosen layer W."""

from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(t, s) [B] -> w [B], levels of a jump in the unit of sigma."""

WEIGHTINGS = ("uniform", "snr", "snr+1", "truncated-snr", "karras", "jump", "sqrt-t")


def weighting(name: str, *, sigma_data: float, power: float = 1.0) -> Weighting:
    """The weight of a sample's CTM loss by its levels, one of ``WEIGHTINGS``, with snr = t^-2.

        uniform 1,  snr,  snr+1,  truncated-snr max(snr, 1),  sqrt-t sqrt(t)
        karras  snr + 1 / sd^2 = (t^2 + sd^2) / (t sd)^2    EDM, arXiv 2206.00364, Table 1; DSM's weight, too
        jump    (1 - s / t)^-power                          infinite at s = t

    Those of the published CTM code, which has ``karras`` twice and says ``uniform_g`` for jump, ``sq-t-inverse`` for
    sqrt-t. Raises ValueError for another name.
    """
    table: dict[str, Weighting] = {
        "uniform": lambda t, s: torch.ones_like(t),
        "snr": lambda t, s: t**-2,
        "snr+1": lambda t, s: t**-2 + 1,
        "truncated-snr": lambda t, s: (t**-2).clamp(min=1),
        "karras": lambda t, s: (t.square() + sigma_data**2) / (t * sigma_data).square(),
        "jump": lambda t, s: (1 - s / t) ** -power,
        "sqrt-t": lambda t, s: t.sqrt(),
    }
    if name not in table:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {name!r}")
    return table[name]


def adaptive_weight(norm_ctm: Tensor, norm: Tensor, *, lowest: float, highest: float) -> Tensor:
    """lambda = clip(|dL_CTM/dW| / (|dL/dW| + 1e-4), lowest, highest), without a gradient.

    CTM (arXiv 2310.02279) Sec. 4; the published ranges are [0, 1e4] for DSM and [0.01, 10] for the adversarial loss.
    """
    return (norm_ctm.detach() / (norm.detach() + 1e-4)).clamp(lowest, highest)
