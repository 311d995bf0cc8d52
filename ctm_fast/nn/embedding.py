"""Noise levels, class labels and augmentations as the vectors that the blocks are conditioned on."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.nn.conv import Init, Linear
from ctm_fast.ops import noise_embed, noise_frequencies
from ctm_fast.ops.noise_embed import CNoise, Order


class LevelEmbedding(nn.Module):
    """Embeddings of t and, with the s-branch, of s: what the families of networks share.

        e     = features(c_noise(t)) + map_augment(augment_labels)
        emb   = silu(map_layer1(silu(map_layer0(e))))

    s has its own two layers and shares everything before them. Where the label goes is up to the subclass.

    ``forward(t, s, labels, augment_labels)``: t, s [B] float32; labels [B] int64 class indices or [B, label_dim]
    float, one-hot (zeros: no class, what a guided sampler subtracts); augment_labels [B, augment_dim] float or None
    for an image as it is. Returns (emb, emb_s), each [B, emb_channels] float32; emb_s is None without the s-branch.

    Args:
        label_dropout: the probability in training that a sample's label is replaced by zeros.
        freqs: [noise_channels / 2] float32, of the features; ``fourier``: to be multiplied by 2 pi, and part of the
            checkpoint as they are random.
    """

    freqs: Tensor
    c_noise: CNoise = "edm"
    order: Order = "sin_cos"

    def __init__(
        self,
        freqs: Tensor,
        emb_channels: int,
        *,
        fourier: bool = False,
        label_dim: int = 0,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
        s_branch: bool = False,
        init: Init,
    ) -> None:
        super().__init__()
        self.fourier = fourier
        self.label_dim = label_dim
        self.label_dropout = label_dropout
        self.augment_dim = augment_dim
        noise_channels = 2 * freqs.shape[0]
        self.register_buffer("freqs", freqs, persistent=fourier)
        self.map_label = self._map_label(noise_channels, emb_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        self.map_layer0_s = Linear(noise_channels, emb_channels, init=init) if s_branch else None
        self.map_layer1_s = Linear(emb_channels, emb_channels, init=init) if s_branch else None

    def _map_label(self, noise_channels: int, emb_channels: int) -> Linear:
        raise NotImplementedError

    def _features(self, t: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The features of t and, with the s-branch, of s."""
        freqs = self.freqs * (2 * math.pi) if self.fourier else self.freqs
        if self.map_layer0_s is None:
            return noise_embed(t, freqs=freqs, c_noise=self.c_noise, order=self.order), None
        if s is None:
            raise ValueError("s: expected a noise level for a network with an s-branch, got None")
        return noise_embed(t, s, freqs=freqs, c_noise=self.c_noise, order=self.order)

    def _layers(self, features: Tensor) -> Tensor:
        return self.map_layer1(functional.silu(self.map_layer0(features)))

    def _layers_s(self, features: Tensor | None) -> Tensor | None:
        if features is None or self.map_layer0_s is None or self.map_layer1_s is None:
            return None
        return functional.silu(self.map_layer1_s(functional.silu(self.map_layer0_s(features))))

    def _label(self, labels: Tensor | None, t: Tensor) -> Tensor | None:
        """One-hot [B, label_dim] float32; None for an unconditional network."""
        if self.map_label is None:
            if labels is not None:
                raise ValueError("labels: expected None for an unconditional network, got a tensor")
            return None
        if labels is None:
            raise ValueError(f"labels: expected class indices [B] in 0..{self.label_dim - 1}, got None")
        if labels.dim() == 1:
            labels = functional.one_hot(labels, self.label_dim)
        if labels.shape != (t.shape[0], self.label_dim):
            raise ValueError(
                f"labels: expected [{t.shape[0]}] or [{t.shape[0]}, {self.label_dim}], got {list(labels.shape)}"
            )
        labels = labels.to(torch.float32)
        if self.training and self.label_dropout:
            labels = labels * (torch.rand_like(labels[:, :1]) >= self.label_dropout)
        return labels

    def _augment(self, augment_labels: Tensor | None, t: Tensor) -> Tensor | float:
        if augment_labels is None:
            return 0.0
        if self.map_augment is None:
            raise ValueError("augment_labels: expected None for a network without that input, got a tensor")
        if augment_labels.shape != (t.shape[0], self.augment_dim):
            raise ValueError(
                f"augment_labels: expected [{t.shape[0]}, {self.augment_dim}], got {list(augment_labels.shape)}"
            )
        return self.map_augment(augment_labels.to(torch.float32))


class SongEmbedding(LevelEmbedding):
    """DDPM++ and NCSN++: c_noise = ln(t) / 4, and the projected label joins the features of both levels.

    The features are positional or, for NCSN++, Fourier features of normal frequencies of standard deviation 16.
    """

    def __init__(
        self,
        noise_channels: int,
        emb_channels: int,
        *,
        fourier: bool = False,
        label_dim: int = 0,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
        s_branch: bool = False,
    ) -> None:
        super().__init__(
            16 * torch.randn(noise_channels // 2) if fourier else noise_frequencies(noise_channels, endpoint=True),
            emb_channels,
            fourier=fourier,
            label_dim=label_dim,
            label_dropout=label_dropout,
            augment_dim=augment_dim,
            s_branch=s_branch,
            init="xavier",
        )

    def _map_label(self, noise_channels: int, emb_channels: int) -> Linear:
        return Linear(self.label_dim, noise_channels)

    def forward(
        self, t: Tensor, s: Tensor | None, labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        features, features_s = self._features(t, s)
        common: Tensor | float = self._augment(augment_labels, t)
        one_hot = self._label(labels, t)
        if one_hot is not None and self.map_label is not None:
            common = common + self.map_label(one_hot * math.sqrt(self.label_dim))
        emb = functional.silu(self._layers(features + common))
        return emb, self._layers_s(None if features_s is None else features_s + common)


class ADMEmbedding(LevelEmbedding):
    """ADM: the label's row of a table joins the embedding of t, before the last SiLU, and not that of s.

    Args:
        c_noise: "adm", 250 ln(t), or "edm", ln(t) / 4: which of the two the weights were trained with.
    """

    order: Order = "cos_sin"

    def __init__(
        self,
        noise_channels: int,
        emb_channels: int,
        *,
        c_noise: CNoise,
        label_dim: int = 0,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
        s_branch: bool = False,
    ) -> None:
        super().__init__(
            noise_frequencies(noise_channels, endpoint=False),
            emb_channels,
            label_dim=label_dim,
            label_dropout=label_dropout,
            augment_dim=augment_dim,
            s_branch=s_branch,
            init="uniform",
        )
        self.c_noise = c_noise

    def _map_label(self, noise_channels: int, emb_channels: int) -> Linear:
        layer = Linear(self.label_dim, emb_channels, bias=False, init="uniform")
        nn.init.normal_(layer.weight)  # the rows of a table, as large for 1000 classes as for 10
        return layer

    def forward(
        self, t: Tensor, s: Tensor | None, labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        features, features_s = self._features(t, s)
        common = self._augment(augment_labels, t)
        emb = self._layers(features + common)
        one_hot = self._label(labels, t)
        if one_hot is not None and self.map_label is not None:
            emb = emb + self.map_label(one_hot)
        return functional.silu(emb), self._layers_s(None if features_s is None else features_s + common)
