"""The networks that are timed, and the ways to run them."""

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Way
from ctm_fast.models import CTM, NetworkConfig, build_network
from ctm_fast.training.presets import preset

DEFAULTS = Way("compiled+defaults", None, compiled=True)

DIGITS = preset("digits")
NETWORKS = {
    "digits": (DIGITS.network, DIGITS.ctm.batch),
    "ddpmpp-32": (NetworkConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, dropout=0.0), 8),
}
"""Name -> network, batch. ddpmpp-32 has the resolution, attention and levels of CIFAR-10's, at a tenth of its width."""


def build(name: str) -> CTM:
    """A student with random weights, such that the network's output is not zero, as a fresh one's would be."""
    torch.manual_seed(0)
    model = CTM(build_network(NETWORKS[name][0], s_branch=True), DIGITS.sigma_data).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def labels(name: str, batch: int) -> Tensor | None:
    classes = NETWORKS[name][0].label_dim
    return torch.arange(batch, device=DEVICE) % classes if classes else None
