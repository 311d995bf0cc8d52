"""Perceptual distances: the equation in float64, and the order that people give to distortions of equal error."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.losses import PerceptualDistance, distance
from ctm_fast.losses.perceptual import efflite0, lpips
from ctm_fast.models.features import EfficientNetLite0
from tests.losses.perceptual_files import PLACES, write_random_files


def photographs(size: int) -> list[Tensor]:
    """Three colour pictures [1, 3, size, size]."""
    data = pytest.importorskip("skimage.data", reason="scikit-image, which has the photographs, is not installed")
    pictures = []
    for name in ("astronaut", "chelsea", "coffee"):
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 127.5 - 1
        height, width = image.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[:, :, top : top + side, left : left + side]
        pictures.append(F.interpolate(square, size=(size, size), mode="bilinear", antialias=True))
    return pictures


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_random_files(tmp_path_factory.mktemp("lpips"))


def equation(files: tuple[Path, Path], a: Tensor, b: Tensor, size: int | None) -> Tensor:
    """LPIPS with average pooling in float64, a layer after the other."""
    backbone, heads = (torch.load(file, weights_only=True) for file in files)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    total = torch.zeros(len(a), dtype=torch.float64)
    both = torch.cat([a, b]).double()
    if size is not None:
        both = F.interpolate(both, size=(size, size), mode="bilinear", align_corners=False)
    h, level = ((both + 1) / 2 - mean) / std, 0
    for place in PLACES:
        if place in (5, 10, 17, 24):
            h = F.avg_pool2d(h, 2)
        name = f"features.{place}"
        h = F.relu(F.conv2d(h, backbone[f"{name}.weight"].double(), backbone[f"{name}.bias"].double(), padding=1))
        if place in (2, 7, 14, 21, 28):
            normalised = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (normalised[: len(a)] - normalised[len(a) :]).square()
            total += (difference * heads[f"lin{level}.model.1.weight"].double()).sum(1).mean((1, 2))
            level += 1
    return total


@pytest.mark.parametrize("size", [None, 40])
def test_lpips(files: tuple[Path, Path], size: int | None, generator: torch.Generator) -> None:
    a, b = (torch.rand(2, 3, 24, 32, generator=generator) * 2 - 1 for _ in range(2))
    d = distance("lpips", c=0, vgg16=files[0], lpips_heads=files[1], size=size)
    torch.testing.assert_close(d(a, b).double(), equation(files, a, b, size), rtol=1e-5, atol=0)
    assert torch.equal(d(a, a), torch.zeros(2))
    torch.testing.assert_close(d(a, b), d(b, a))
    torch.testing.assert_close(d(a[:, :1], b[:, :1]), d(a[:, :1].repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)))


def test_float32_under_autocast(files: tuple[Path, Path], generator: torch.Generator) -> None:
    a, b = (torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    d = lpips(*files, size=None)
    expected = d(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d(a, b), expected)
    assert d(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_the_size_is_224_unless_told(files: tuple[Path, Path]) -> None:
    assert lpips(*files).network.size == 224
    assert efflite0().network.size == 224


def test_gradient_where_all_features_are_zero(files: tuple[Path, Path]) -> None:
    """A map without any active channel is no NaN, for value or gradient."""

    class Dead(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x * 0, F.relu(x)]

    a, b = torch.zeros(1, 3, 4, 4, requires_grad=True), torch.ones(1, 3, 4, 4)
    d = PerceptualDistance(Dead())(a, b)
    assert d.item() == pytest.approx(0.5)  # a unit vector against nothing, in one of two maps
    d.sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()


def test_gradients_go_to_images_only(files: tuple[Path, Path], generator: torch.Generator) -> None:
    a = (torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1).requires_grad_()
    d = lpips(*files, size=None)
    d(a, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in d.parameters())
    step = 1e-2 * a.grad / a.grad.norm()
    with torch.no_grad():
        zero = torch.zeros(1, 3, 32, 32)
        change = d(a + step, zero) - d(a - step, zero)
    assert change.item() == pytest.approx(2e-2 * a.grad.norm().item(), rel=0.02)


def test_efflite0_orders_distortions_as_people_do() -> None:
    """Of equal root-mean-square error: noise, then one pixel's shift, then brightness (the issue: .61, .18, .03)."""
    d = distance("efflite0", c=0)
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(3)
    for picture in photographs(66):
        image, shifted = picture[:, :, 1:-1, 1:-1], picture[:, :, 1:-1, 2:]
        error = (shifted - image).square().mean().sqrt()
        noise = torch.randn(image.shape, generator=generator)
        noise *= error / noise.square().mean().sqrt()
        distorted = (image + noise, shifted, image + error)
        for other in distorted:
            torch.testing.assert_close((other - image).square().mean().sqrt(), error)
        values = torch.cat([d(image, other) for other in distorted])
        assert values[0] > 2 * values[1] > 6 * values[2] > 0
        means += values / 3
    torch.testing.assert_close(means, torch.tensor([0.65, 0.20, 0.03]), rtol=0.15, atol=0.0)


def test_efflite0_is_the_mean_over_six_maps(generator: torch.Generator) -> None:
    a, b = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    net = EfficientNetLite0((-1, 0, 2, 4, 10, 15), size=64)
    total = torch.zeros(2)
    for f, g in zip(net(a), net(b), strict=True):
        total += 2 - 2 * F.cosine_similarity(f, g, dim=1).mean((1, 2))
    torch.testing.assert_close(efflite0(size=64)(a, b), total / 6, rtol=1e-4, atol=1e-6)


def test_weights_of_a_users_network() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    a[:, 0], b[:, 1] = 1, 1  # unit vectors at a right angle, everywhere

    def network(x: Tensor) -> list[Tensor]:
        return [x, x[:, :2]]

    weights = [torch.tensor([1.0, 2, 4]), torch.tensor([8.0, 16])]
    assert PerceptualDistance(network, weights)(a, b).item() == pytest.approx(1 + 2 + 8 + 16)
    assert PerceptualDistance(network)(a, b).item() == pytest.approx(2)
    with pytest.raises(ValueError, match="network: expected 1 maps, one for each weight, got 2"):
        PerceptualDistance(network, weights[:1])(a, b)
    with pytest.raises(ValueError, match=r"b: expected the shape \[1, 3, 2, 2\] of a, got \[1, 3, 2, 1\]"):
        PerceptualDistance(network)(a, b[..., :1])


def test_heads_of_the_installed_package(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """They are read without importing lpips, which would import torchvision."""
    weights = tmp_path / "lpips" / "weights" / "v0.1"
    weights.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise RuntimeError('imported')")
    (weights / "vgg.pth").write_bytes(files[1].read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    a, b = (torch.rand(1, 3, 16, 16, generator=generator) for _ in range(2))
    assert torch.equal(lpips(files[0], size=None)(a, b), lpips(*files, size=None)(a, b))
    assert "lpips" not in sys.modules


def test_missing_weights(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"lpips: expected the path of torchvision's vgg16-397923af\.pth, got none"):
        distance("lpips", c=0)
    with pytest.raises(CheckpointError, match=r"no\.pth: expected a file of weights, got no such file"):
        distance("lpips", c=0, vgg16=tmp_path / "no.pth", lpips_heads=files[1])
    with pytest.raises(CheckpointError, match=r"vgg16\.pth: tensor features\.0\.bias is not in the network"):
        distance("lpips", c=0, vgg16=files[0], lpips_heads=files[0])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    with pytest.raises(
        ConfigError, match=r"lpips/weights/v0\.1/vgg\.pth.* not installed: give the path of lpips 0\.1\.4"
    ):
        distance("lpips", c=0, vgg16=files[0])
