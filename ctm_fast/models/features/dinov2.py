"""DINOv2's vision transformers, patch 14 (arXiv 2304.07193): features of FD-DINOv2 (arXiv 2306.04675)."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features.network import IMAGENET_MEAN, IMAGENET_STD, Normalize, freeze
from ctm_fast.models.features.weights import read_weights
from ctm_fast.models.published import read_state_dict

PATCH, SIZE = 14, 224
GRID = SIZE // PATCH
TRAINED_GRID = 37  # 518 pixels
HEAD_WIDTH = 64
DEPTHS = {384: 12, 768: 12, 1024: 24}
"""Width -> number of blocks: ViT-S, ViT-B and ViT-L."""
_OFFSET = 0.1  # the published code adds it to the new grid before it divides by the old


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, C]; q, k, v are three-major in one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A transformer block, normalised before each of its two branches and scaled behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Tokens [B, 256, C] of the 14x14 patches, row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """The class token [B, 384, 768 or 1024] of images [B, 1 or 3, H, W] in [-1, 1], behind the final norm; frozen.

    Images are resized to 224 pixels by Pillow's bicubic rule (antialiased where they shrink), not rounded.

    Args:
        path: Meta's state dict of ViT-S/14, ViT-B/14 or ViT-L/14 without registers, ``dinov2_vitb14_pretrain.pth``.

    Raises CheckpointError naming the file where it does not hold those weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        width, depth = _size(path)
        self.width = width
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + TRAINED_GRID**2, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        tensors = read_weights(path, shapes, unused=("mask_token",))  # of the training objective
        tensors["pos_embed"] = positions(tensors["pos_embed"])
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + GRID**2, width))
        self.load_state_dict(tensors)
        freeze(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalize(images)
        if x.shape[2:] != (SIZE, SIZE):
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed
        for block in self.blocks:
            h = block(h)
        return self.norm(h[:, 0])


def positions(embedding: Tensor) -> Tensor:
    """The embedding [1, 1 + 37^2, C] of positions at 518 pixels, brought to the 16x16 patches of 224, as published."""
    grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (TRAINED_GRID, TRAINED_GRID))
    factor = (GRID + _OFFSET) / TRAINED_GRID
    small = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([embedding[:, :1], small.flatten(2).transpose(1, 2)], 1)


def _size(path: str | Path) -> tuple[int, int]:
    """Width and depth, by names and shapes in the file."""
    tensors = read_state_dict(path)
    width = tensors.shape("cls_token")[-1] if "cls_token" in tensors else 0
    depth = 1 + max(
        (int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,3})\.", name))), default=-1
    )
    if DEPTHS.get(width) != depth:
        expected = ", ".join(f"{d} blocks of width {w}" for w, d in DEPTHS.items())
        raise CheckpointError(f"{path}: expected a DINOv2 of {expected}, got {depth} blocks of width {width}")
    return width, depth
