"""DeiT-base, distilled, patch 16, 224 pixels (arXiv 2012.12877): the discriminator's transformer backbone."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.models.features.network import IMAGENET_MEAN, IMAGENET_STD, Normalize, freeze, resize
from ctm_fast.models.features.weights import read_weights

TAPS = (2, 5, 8, 11)
"""The blocks whose outputs are taken, as in the published discriminator."""
SIZE, PATCH, WIDTH, DEPTH, HEADS = 224, 16, 768, 12, 12
GRID = SIZE // PATCH
PREFIX = 2
"""Tokens before those of the patches: class and distillation."""
CLASSES = 1000


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, C]; q, k, v are three-major in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block, normalised before each of its two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Tokens [B, 196, C] of the 16x16 patches, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DeiT(nn.Module):
    """Four maps [B, 768, 14, 14], the patch tokens after blocks 2, 5, 8 and 11, of images [B, 1 or 3, H, W] in [-1, 1].

    Images are resized to 224 pixels. Frozen; its final norm and classifiers are not used.

    Args:
        path: the file of timm's ``deit_base_distilled_patch16_224``, a state dict or one under the key ``model``.

    Raises CheckpointError naming the file where it does not hold those weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.dist_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, PREFIX + GRID**2, WIDTH))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        tensors = read_weights(path, self.published_shapes())
        self.load_state_dict({name: tensors[name] for name in self.state_dict()})
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        patches = self.patch_embed(resize(self.normalize(images), SIZE))
        prefix = torch.cat([self.cls_token, self.dist_token], dim=1).expand(len(images), -1, -1)
        h = torch.cat([prefix, patches], dim=1) + self.pos_embed
        maps = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index in TAPS:
                maps.append(h[:, PREFIX:].transpose(1, 2).unflatten(2, (GRID, GRID)))
        return maps

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the 155 tensors of the published file, those that are not used among them."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
        for head in ("head", "head_dist"):
            shapes |= {f"{head}.weight": (CLASSES, WIDTH), f"{head}.bias": (CLASSES,)}
        return shapes
