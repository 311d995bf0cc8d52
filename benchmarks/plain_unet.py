"""The DDPM++ network from PyTorch's own modules, for comparison: what one would write without this library.

``plain(network)`` has the weights of a :class:`~ctm_fast.models.UNet` under the same names; its embedding of the
levels, a thousandth of the work, is the network's own. Images stay in the memory format that they come in, as the
weights do: contiguous, or channels_last after ``.to(memory_format=torch.channels_last)``. It has no dropout.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctm_fast import nn as ours
from ctm_fast.models import UNet


def _norm(norm: ours.GroupNorm) -> nn.GroupNorm:
    return nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)


def _conv(conv: ours.Conv2d) -> nn.Module:
    (kernel, _) = conv.kernel_size
    return nn.Conv2d(conv.in_channels, conv.out_channels, kernel, padding=kernel // 2)


def _resample(x: Tensor, resample: str | None) -> Tensor:
    if resample == "up":
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return x if resample is None else functional.avg_pool2d(x, 2)


class _Attention(nn.Module):
    def __init__(self, attention: ours.SelfAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.norm2, self.qkv, self.proj = _norm(attention.norm2), _conv(attention.qkv), _conv(attention.proj)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(-1, -2).reshape(x.shape))


class _Block(nn.Module):
    def __init__(self, block: ours.UNetBlock) -> None:
        super().__init__()
        self.resample = block.resample
        self.norm0, self.norm1 = _norm(block.norm0), _norm(block.norm1)
        self.conv0, self.conv1 = _conv(block.conv0), _conv(block.conv1)
        self.affine = nn.Linear(block.affine.in_features, block.affine.out_features)
        self.affine_s = (
            None if block.affine_s is None else nn.Linear(block.affine.in_features, block.affine.out_features)
        )
        self.skip = _conv(block.skip) if isinstance(block.skip, ours.Conv2d) else None
        self.attention = None if block.attention is None else _Attention(block.attention)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        h = self.conv0(_resample(functional.silu(self.norm0(x)), self.resample))
        shift = self.affine(emb)
        if self.affine_s is not None:
            shift = shift + self.affine_s(emb_s)
        h = self.conv1(functional.silu(self.norm1(h + shift[:, :, None, None])))
        skip = x if self.skip is None else self.skip(_resample(x, self.resample))
        y = (skip + h) * 0.5**0.5
        return y if self.attention is None else (self.attention(y) + y) * 0.5**0.5


class _Network(nn.Module):
    def __init__(self, network: UNet) -> None:
        super().__init__()

        def layers(ours_: nn.ModuleDict) -> nn.ModuleDict:
            made: dict[str, Any] = {
                name: _Block(layer) if isinstance(layer, ours.UNetBlock) else _conv(layer)  # type: ignore[arg-type]
                for name, layer in ours_.items()
            }
            return nn.ModuleDict(made)

        self.embedding = copy.deepcopy(network.embedding)
        self.enc, self.dec = layers(network.enc), layers(network.dec)
        self.out_norm, self.out_conv = _norm(network.out_norm), _conv(network.out_conv)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        emb, emb_s = self.embedding(t, s, labels, augment_labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb, emb_s) if isinstance(layer, _Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb, emb_s)
        return self.out_conv(functional.silu(self.out_norm(x)))


def plain(network: UNet) -> nn.Module:
    """The same function of the same weights, in contiguous memory; in evaluation mode, that is without dropout.

    Raises ValueError for another architecture than DDPM++.
    """
    if network.config.arch != "ddpmpp":
        raise ValueError(f"network: expected the architecture ddpmpp, got {network.config.arch}")
    made = _Network(network)
    made.load_state_dict(network.state_dict())
    return made.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
