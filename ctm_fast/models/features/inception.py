"""TensorFlow's Inception of 2015-12-05 (arXiv 1512.00567), in whose features alone a Frechet distance is an FID.

It differs from what is usually called Inception v3: images are resized as TensorFlow 1 does, averages leave out the
padding, the last block takes a maximum, and the classifier has 1,008 classes.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError, reason
from ctm_fast.models.features.network import freeze, rgb
from ctm_fast.models.features.weights import read_weights

SIZE, WIDTH, CLASSES = 299, 2048, 1008
SPATIAL_CHANNELS = 7
"""Of ``mixed_6/conv``, 17x17: what sFID is taken of (arXiv 2103.03841)."""
_EPS = 1e-3


class InceptionFeatures(NamedTuple):
    """Of images [B, ...]: ``pooled`` [B, 2048], ``spatial`` [B, 7, 17, 17], ``logits`` [B, 1008] without their bias.

    The published Inception score leaves the bias out as well.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


def resize_tensorflow(images: Tensor, size: int = SIZE) -> Tensor:
    """Float images [B, C, H, W] at [B, C, size, size] by TensorFlow 1's bilinear rule.

    Output pixel i lies at i H / size among the input's pixels: the first pixels of both coincide, half a pixel off from
    what everyone else does, and the last ones are repeated beyond the border. Nothing is antialiased.
    """
    for dimension in (2, 3):
        old = images.shape[dimension]
        # In float32, as TensorFlow has it: i H / size and its floor may differ otherwise.
        place = torch.arange(size, dtype=torch.float32, device=images.device) * (old / size)
        low = place.floor().long().clamp(max=old - 1)
        high = (low + 1).clamp(max=old - 1)
        weight = (place - low).to(images).view([size, 1] if dimension == 2 else [size])
        images = torch.lerp(images.index_select(dimension, low), images.index_select(dimension, high), weight)
    return images


class Conv(nn.Module):
    """Convolution, batch norm without learned scale, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, size: int | tuple[int, int], *, stride: int = 1, padding: bool = True
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        around = (height // 2, width // 2) if padding else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two of 3x3, average."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17: 3x3, two of 3x3, maximum."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, padding=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding=False)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17: 1x1, 7x7 in two and in four parts, average."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(inputs, width, 1), Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(inputs, width, 1), Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, row), Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        sevens = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), sevens, twice, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8: 3x3, 7x7 and 3x3, maximum."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inputs, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding=False)

    def forward(self, x: Tensor) -> Tensor:
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8: 1x1, 3x3 and two of 3x3 each ending in a row and a column side by side, average or maximum."""

    def __init__(self, inputs: int, *, maximum: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.maximum = maximum
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Features of images [B, 1 or 3, H, W] in 0..255, of any size, uint8 or float; frozen.

    Args:
        path: torch-fidelity's state dict ``weights-inception-2015-12-05-6726825d.pth`` (which is pytorch-fid's), or
            any other file of those 94 convolutions and the classifier under those names.

    Raises CheckpointError naming the file where it does not hold those weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, maximum=False), BlockE(2048, maximum=True)
        self.fc = nn.Linear(WIDTH, CLASSES)
        state = self.state_dict()
        counters = {name for name in state if name.endswith("num_batches_tracked")}  # not in every file
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in counters}
        self.load_state_dict(read_weights(path, shapes, unused=tuple(counters)), strict=False)
        freeze(self)

    def forward(self, images: Tensor) -> InceptionFeatures:
        x = (resize_tensorflow(rgb(images).float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pooled = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return InceptionFeatures(pooled, spatial, pooled @ self.fc.weight.T)


class ScriptedInception(nn.Module):
    """The same network as NVIDIA ships it, ``inception-2015-12-05.pt``: a TorchScript archive, whose code is run.

    It resizes as :func:`resize_tensorflow` does; its spatial features cannot be had.

    Raises CheckpointError naming the file where it is no such archive or gives other shapes.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not is_torchscript(path):
            raise CheckpointError(f"{path}: expected a TorchScript archive, got another file")
        try:
            self.script = torch.jit.load(str(path), map_location="cpu").eval()
            pooled = self(torch.zeros(1, 3, 32, 32))
        except Exception as error:  # a foreign archive may fail at any depth
            raise CheckpointError(f"{path}: not a TorchScript Inception: {reason(error)[:200]}") from error
        if pooled.shape != (1, WIDTH):
            raise CheckpointError(f"{path}: expected features [1, {WIDTH}], got {list(pooled.shape)}")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.script(rgb(images), return_features=True)
        return features.float()


def is_torchscript(path: str | Path) -> bool:
    """Whether the file is an archive of TorchScript, by what is in it, not by its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def load_inception(path: str | Path) -> tuple[nn.Module, str]:
    """The Inception in a file of any of its forms, told by the content, and what form it is.

    Raises CheckpointError naming the file.
    """
    if is_torchscript(path):
        return ScriptedInception(path), "TorchScript, whose code was run"
    return Inception(path), "state dict"
