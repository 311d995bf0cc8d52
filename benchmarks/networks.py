"""The networks that are timed, and the ways to run them."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import BATCHES, DEVICE, NETWORK_DTYPE, Way
from ctm_fast.models import CTM, NetworkConfig, build_network, network_preset
from ctm_fast.training.presets import preset

DEFAULTS = Way("compiled+defaults", None, compiled=True)

DIGITS = preset("digits")
FULL_SIZE = {
    "cifar10": replace(network_preset("cifar10-ddpmpp"), dropout=0.0),
    "imagenet64": network_preset("imagenet64-adm"),
}
"""The paper's networks. Without dropout: a random mask would hide whether two ways agree."""
NETWORKS = {
    "digits": (DIGITS.network, DIGITS.ctm.batch),
    "ddpmpp-32": (NetworkConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, dropout=0.0), 8),
}
"""Name -> network, batch. ddpmpp-32 has the resolution, attention and levels of CIFAR-10's, at a tenth of its width.

The full-size networks on a GPU only: a call of CIFAR-10's takes seconds on a core of a CPU, compiling it five ways
minutes; ``bench_cifar_network.py`` times it there.
"""
if DEVICE.type == "cuda":
    NETWORKS |= {f"{name}-{batch}": (network, batch) for name, network in FULL_SIZE.items() for batch in BATCHES}


def build(name: str) -> CTM:
    """A student with random weights, such that the network's output is not zero, as a fresh one's would be."""
    torch.manual_seed(0)
    network = build_network(NETWORKS[name][0], s_branch=True)
    model = CTM(network, DIGITS.sigma_data, dtype=NETWORK_DTYPE).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def labels(name: str, batch: int) -> Tensor | None:
    classes = NETWORKS[name][0].label_dim
    return torch.arange(batch, device=DEVICE) % classes if classes else None
