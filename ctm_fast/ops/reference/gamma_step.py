"""Jump and re-noising in plain PyTorch."""

from torch import Tensor

from ctm_fast.ops.reference.philox_normal import philox_normal
from ctm_fast.ops.reference.precond_combine import precond_combine


def gamma_step(
    x: Tensor,
    F_x: Tensor,
    t: Tensor,
    s: Tensor,
    t_next: Tensor,
    seeds: Tensor,
    step: int,
    stream: int,
    sigma_data: float,
) -> Tensor:
    std = ((t_next - s) * (t_next + s)).sqrt().view(-1, 1, 1, 1)
    noise = philox_normal(seeds, step, x.shape[1:], stream, channels_last=False)
    return precond_combine(x, F_x, t, s, sigma_data) + std * noise
