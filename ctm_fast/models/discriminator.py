"""The discriminator of a projected GAN (arXiv 2111.01007, 2202.00273): small heads on the features of frozen networks.

It takes feature maps, not images: the networks that make them stay outside, so that its state dict is what a run trains
and draws (heads and random projectors), and nothing that a package or a file holds already.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ctm_fast.models.batch_norm import SyncBatchNorm2d
from ctm_fast.models.features.network import Shape
from ctm_fast.models.projector import RandomProjector

LOGITS_KERNEL = 4


class DownBlock(nn.Module):
    """Spectrally normalised 4x4 convolution of stride 2, batch norm, LeakyReLU(0.2)."""

    def __init__(self, inputs: int, outputs: int, *, sync: bool) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
        self.norm = SyncBatchNorm2d(outputs) if sync else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Head(nn.Module):
    """Logits [B, H', W'] of one projected map: DownBlocks, then a 4x4 convolution without padding.

    Given ``classes``, each logit is psi(h) + <V_y, phi(h)> / sqrt(K) (projection, arXiv 1802.05637, Eq. 3): psi and
    phi are such convolutions to 1 and to K channels, V_y the label's embedding.

    Args:
        widths: of the map, and of each block's output.
        classes: 0 for a head that does not ask for labels.
        sync: batch norms over all ranks, see :class:`ctm_fast.models.batch_norm.SyncBatchNorm2d`.
    """

    def __init__(self, widths: Sequence[int], *, classes: int, embedding: int, sync: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DownBlock(inputs, outputs, sync=sync) for inputs, outputs in pairwise(widths)))
        self.logits = spectral_norm(nn.Conv2d(widths[-1], 1, LOGITS_KERNEL, bias=False))
        self.embed = spectral_norm(nn.Embedding(classes, embedding)) if classes else None
        self.phi = spectral_norm(nn.Conv2d(widths[-1], embedding, LOGITS_KERNEL, bias=False)) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.blocks(x)
        logits: Tensor = self.logits(h).squeeze(1)
        if self.embed is not None and self.phi is not None:
            phi = self.phi(h)
            logits = logits + torch.einsum("bk,bkhw->bhw", self.embed(labels), phi) * phi.shape[1] ** -0.5
        return logits


class Branch(nn.Module):
    """Logits [B, N] of one feature network's maps: its random projector, and a head for each projected map."""

    def __init__(self, shapes: Sequence[Shape], *, width: int, classes: int, embedding: int, sync: bool) -> None:
        super().__init__()
        self.projector = RandomProjector(shapes, width=width)
        self.heads = nn.ModuleList(
            Head(widths, classes=classes, embedding=embedding, sync=sync)
            for widths in _head_widths(self.projector.shapes, width)
        )

    def forward(self, maps: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        projected = zip(self.heads, self.projector(maps), strict=True)
        return torch.cat([head(feature, labels).flatten(1) for head, feature in projected], dim=1)


class ProjectedDiscriminator(nn.Module):
    """Logits [B, N] of the feature maps of one or several frozen networks, one after the other.

    At the published shapes (224 pixels, four maps of 56, 28, 14 and 7) N is 64 for each network, and its heads have
    10,331,328 parameters. Its parameters are the heads; the projectors
    (:class:`ctm_fast.models.projector.RandomProjector`) are buffers, and both are in the state dict. The published
    discriminator is blind to labels (``classes`` = 0).

    Args:
        shapes: of each network, (C, H, W) of its maps, finest first: :func:`ctm_fast.models.features.feature_shapes`.
        seed: of a run: all that is drawn at the start is a function of it, the same on all ranks.
        width: of the finest projected map; the heads end in 2^(maps - 1) times that.
        classes: number of labels, for class-conditional projection; 0 without.
        embedding: K, the width of the labels' embedding.
        sync_batch_norm: statistics of all ranks' batches. Those of micro-batches, and of real and fake images, remain
            apart, so a batch that is split in micro-batches is judged otherwise than at once.

    Raises ValueError naming shapes that do not fit.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[Shape]],
        *,
        seed: int,
        width: int = 64,
        classes: int = 0,
        embedding: int = 64,
        sync_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.classes = classes
        with torch.random.fork_rng(devices=[]):  # the caller's draws go on as if there had been none here
            torch.default_generator.manual_seed(seed)
            self.branches = nn.ModuleList(
                Branch(maps, width=width, classes=classes, embedding=embedding, sync=sync_batch_norm) for maps in shapes
            )

    def forward(self, features: Sequence[Sequence[Tensor]], labels: Tensor | None = None) -> Tensor:
        if self.classes and (labels is None or labels.dtype != torch.int64):
            raise ValueError(f"labels: expected int64 [B], got {None if labels is None else labels.dtype}")
        logits = [branch(maps, labels) for branch, maps in zip(self.branches, features, strict=True)]
        return torch.cat(logits, dim=1)


def _head_widths(shapes: Sequence[Shape], width: int) -> list[list[int]]:
    """Of each head: the map's channels, then one for each halving, down to the size of the coarsest map halved once."""
    height, breadth = (size // 2 for size in shapes[-1][1:])
    if min(height, breadth) < LOGITS_KERNEL:
        raise ValueError(
            f"features: expected the coarsest map to have {LOGITS_KERNEL} pixels or more on each side, got "
            f"{height} x {breadth}"
        )
    ends = [width * 2**index for index in range(len(shapes))]
    return [[shape[0], *ends[index:]] for index, shape in enumerate(shapes)]
