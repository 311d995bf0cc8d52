"""Noise levels and class labels as the vectors that the blocks are conditioned on."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.nn.conv import Linear
from ctm_fast.ops import noise_embed, noise_frequencies


class LevelEmbedding(nn.Module):
    """Embeddings of t and, with the s-branch, of s.

    Positional features of ln(t)/4 plus the projected label, then two linear layers with SiLU; s has its own two
    layers and shares the frequencies and the label projection (arXiv 2310.02279, DDPM++ backbone).

    t, s [B] float32; labels [B] int64 class indices or [B, label_dim] float, one-hot.
    Returns (emb, emb_s), each [B, emb_channels] float32; emb_s is None without the s-branch.
    """

    freqs: Tensor

    def __init__(self, noise_channels: int, emb_channels: int, *, label_dim: int = 0, s_branch: bool = False) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.register_buffer("freqs", noise_frequencies(noise_channels, endpoint=True), persistent=False)
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)
        self.map_layer0_s = Linear(noise_channels, emb_channels) if s_branch else None
        self.map_layer1_s = Linear(emb_channels, emb_channels) if s_branch else None

    def forward(self, t: Tensor, s: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        label = self._label(labels, t)
        if self.map_layer0_s is None or self.map_layer1_s is None:
            features = noise_embed(t, freqs=self.freqs)
            return _mlp(features + label, self.map_layer0, self.map_layer1), None
        if s is None:
            raise ValueError("s: expected a noise level for a network with an s-branch, got None")
        features, features_s = noise_embed(t, s, freqs=self.freqs)
        return (
            _mlp(features + label, self.map_layer0, self.map_layer1),
            _mlp(features_s + label, self.map_layer0_s, self.map_layer1_s),
        )

    def _label(self, labels: Tensor | None, t: Tensor) -> Tensor | float:
        if self.map_label is None:
            if labels is not None:
                raise ValueError("labels: expected None for an unconditional network, got a tensor")
            return 0.0
        if labels is None:
            raise ValueError(f"labels: expected class indices [B] in 0..{self.label_dim - 1}, got None")
        if labels.dim() == 1:
            labels = functional.one_hot(labels, self.label_dim)
        if labels.shape != (t.shape[0], self.label_dim):
            raise ValueError(
                f"labels: expected [{t.shape[0]}] or [{t.shape[0]}, {self.label_dim}], got {list(labels.shape)}"
            )
        return self.map_label(labels.to(torch.float32) * math.sqrt(self.label_dim))


def _mlp(features: Tensor, layer0: Linear, layer1: Linear) -> Tensor:
    return functional.silu(layer1(functional.silu(layer0(features))))
