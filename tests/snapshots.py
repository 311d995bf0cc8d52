"""Snapshots of small networks with random weights, without any training."""

from pathlib import Path

import torch

from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network, save_model
from ctm_fast.training import RunConfig, override, preset
from ctm_fast.training.config import to_dict


def small_config(classes: int) -> RunConfig:
    """The preset ``digits`` with a smaller network of ``classes`` classes, unconditional if 0."""
    conditional = f"data.conditional={'true' if classes else 'false'}"
    return override(preset("digits"), [f"network.label_dim={classes}", conditional, "network.model_channels=8"])


def save_snapshot(path: Path, kind: type[CTM] | type[EDMDenoiser], *, classes: int = 10) -> Path:
    """Write such a model to ``path``, as a run does, and return ``path``."""
    config = small_config(classes)
    generator = torch.Generator().manual_seed(1)
    net = build_network(config.network, s_branch=kind is CTM)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    network: NetworkConfig = config.network
    save_model(path, kind(net, config.sigma_data), network, {"config": to_dict(config), "seed": config.seed})
    return path
