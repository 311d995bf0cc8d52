"""VGG16 with average pooling against its layers written out, on random weights under torchvision's names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features import VGG16

# torchvision's ``features``: widths of the convolutions, P a pooling, each convolution followed by a ReLU.
LAYERS = (64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512, "P", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)


def random_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors, place, inputs = {}, 0, 3
    for layer in LAYERS:
        if layer == "P":
            place += 1
            continue
        assert isinstance(layer, int)
        scale = (2 / (9 * inputs)) ** 0.5
        tensors[f"features.{place}.weight"] = torch.randn(layer, inputs, 3, 3, generator=generator) * scale
        tensors[f"features.{place}.bias"] = torch.randn(layer, generator=generator) * 0.1
        place, inputs = place + 2, layer
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**random_weights(), "classifier.0.weight": torch.zeros(2, 2)}, file)
    return file


def test_maps(path: Path, generator: torch.Generator) -> None:
    images = torch.rand(2, 3, 33, 34, generator=generator) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    h, place, expected = (((images + 1) / 2 - mean) / std).double(), 0, []
    weights = {name: tensor.double() for name, tensor in random_weights().items()}
    for layer in LAYERS:
        if layer == "P":
            h, place = F.avg_pool2d(h, 2, 2), place + 1
            continue
        h = F.relu(F.conv2d(h, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=1))
        if place + 1 in TAPS:
            expected.append(h)
        place += 2
    net = VGG16(path, size=None)
    assert sum(parameter.numel() for parameter in net.parameters()) == 14_714_688
    assert not any(parameter.requires_grad for parameter in net.parameters())
    got = net(images)
    assert [tuple(m.shape[1:]) for m in got] == [(64, 33, 34), (128, 16, 17), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_resized(path: Path, generator: torch.Generator) -> None:
    grey = torch.rand(1, 1, 20, 20, generator=generator) * 2 - 1
    resized = F.interpolate(grey, size=(48, 48), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    for a, b in zip(VGG16(path, size=48)(grey), VGG16(path, size=None)(resized), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected 16 pixels or more"):
        VGG16(path, size=None)(torch.zeros(1, 3, 15, 32))
    with pytest.raises(CheckpointError, match=r"none.pth: expected a file of weights, got no such file"):
        VGG16(tmp_path / "none.pth")
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    with pytest.raises(CheckpointError, match=r"other.pth: tensor features\.0\.bias is missing"):
        VGG16(other)
