"""One small network of each architecture, with every option that it has."""

import torch

from ctm_fast.models import NetworkConfig, UNet, build_network

SMALL = {
    arch: NetworkConfig(
        arch=arch,
        img_resolution=8,
        label_dim=5,
        model_channels=32 if arch == "adm" else 16,  # adm has 32 groups
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        head_channels=16,
    )
    for arch in ("ddpmpp", "ncsnpp", "adm", "dhariwal")
}


def random_network(config: NetworkConfig, *, s_branch: bool, seed: int = 0) -> UNet:
    """In eval mode, with no parameter left at a zero."""
    net = build_network(config, s_branch=s_branch).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            one = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0  # a norm's gain
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(one + torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return net
