"""Adaptive weights: each further loss pulls on a chosen layer W as hard as the CTM loss does."""

from torch import Tensor


def adaptive_weight(norm_ctm: Tensor, norm: Tensor, *, lowest: float, highest: float) -> Tensor:
    """lambda = clip(|dL_CTM/dW| / (|dL/dW| + 1e-4), lowest, highest), without a gradient.

    CTM (arXiv 2310.02279) Sec. 4; the published ranges are [0, 1e4] for DSM and [0.01, 10] for the adversarial loss.
    """
    return (norm_ctm.detach() / (norm.detach() + 1e-4)).clamp(lowest, highest)
