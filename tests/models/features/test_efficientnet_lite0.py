"""EfficientNet-Lite0 against the published tensors, walked unfolded in float64, and against photographs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.models.features import EfficientNetLite0, feature_shapes
from ctm_fast.models.features import efficientnet_lite0 as lite0
from ctm_fast.models.features.network import resize
from ctm_fast.models.features.weights import package_file, read_weights

Tensors = dict[str, Tensor]
WIDTHS = {lite0.STEM: 32, 0: 16, 2: 24, 4: 40, 10: 112, 15: 320}
STRIDES = {1: 2, 3: 2, 5: 2, 11: 2}


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return package_file(lite0.PACKAGE, lite0.FILE, "")
    except ConfigError as error:
        pytest.skip(f"the extra [features] is not installed: {error}")


@pytest.fixture(scope="module")
def published(path: Path) -> Tensors:
    tensors: Tensors = torch.load(path, weights_only=True)
    return {name: tensor.double() for name, tensor in tensors.items()}


def same_conv(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """TensorFlow's SAME: as few zeros as give ceil(size / stride), the odd one after."""
    for axis in (3, 2):
        size, kernel = x.shape[axis], weight.shape[axis]
        zeros = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads = [0, 0, 0, 0]
        pads[2 * (3 - axis) : 2 * (3 - axis) + 2] = [zeros // 2, zeros - zeros // 2]
        x = F.pad(x, pads)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def unfolded(tensors: Tensors, images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Every block's output, and the logits, with batch norms as they are published."""

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    maps = {}
    h = F.relu6(norm(same_conv(images, tensors["_conv_stem.weight"], 2, 1), "_bn0"))
    maps[lite0.STEM] = h
    for index in range(16):
        name, x = f"_blocks.{index}", h
        if index:
            h = F.relu6(norm(same_conv(h, tensors[f"{name}._expand_conv.weight"], 1, 1), f"{name}._bn0"))
        filters = tensors[f"{name}._depthwise_conv.weight"]
        h = F.relu6(norm(same_conv(h, filters, STRIDES.get(index, 1), len(filters)), f"{name}._bn1"))
        h = norm(same_conv(h, tensors[f"{name}._project_conv.weight"], 1, 1), f"{name}._bn2")
        maps[index] = h = x + h if x.shape == h.shape else h
    h = F.relu6(norm(same_conv(h, tensors["_conv_head.weight"], 1, 1), "_bn1"))
    return maps, h.mean((2, 3)) @ tensors["_fc.weight"].T + tensors["_fc.bias"]


def close(got: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest value, and a little for fifty float32 layers."""
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 5e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", [(64, 64), (45, 38)], ids=str)
def test_maps(path: Path, published: Tensors, shape: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.rand(2, 3, *shape, generator=generator) * 2 - 1
    net = EfficientNetLite0(lite0.PERCEPTUAL, size=None, path=path)
    maps, logits = unfolded(published, images.double())
    for tap, got in zip(lite0.PERCEPTUAL, net(images), strict=True):
        assert got.shape[1] == WIDTHS[tap]
        close(got, maps[tap])
    close(net.logits(images), logits)


def test_the_file_is_read_whole(published: Tensors) -> None:
    net = EfficientNetLite0()
    shapes = net.published_shapes()
    assert len(shapes) == 296
    assert shapes == {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not net.training


def test_the_pyramid_of_the_discriminator() -> None:
    assert feature_shapes(EfficientNetLite0(), 32) == [(24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]


def test_images_above_the_size_are_not_smoothed(generator: torch.Generator) -> None:
    """Bilinear at every other pixel's middle, without antialiasing: a quarter of each of four neighbours, no more."""
    images = torch.rand(1, 3, 8, 8, generator=generator)
    found = resize(images, 2)  # 4 to 1: of each 4 by 4 block, the middle 2 by 2
    expected = images.unfold(2, 4, 4).unfold(3, 4, 4)[..., 1:3, 1:3].mean((4, 5))
    torch.testing.assert_close(found, expected)


def test_grey_is_repeated_and_resized(generator: torch.Generator) -> None:
    grey = torch.rand(1, 1, 28, 28, generator=generator) * 2 - 1
    resized = F.interpolate(grey, size=(64, 64), mode="bilinear", align_corners=False)
    small = EfficientNetLite0((2, 4), size=64)(grey)
    native = EfficientNetLite0((2, 4), size=None)(resized.repeat(1, 3, 1, 1))
    for a, b in zip(small, native, strict=True):
        close(a, b)


@pytest.mark.parametrize(("name", "label"), [("chelsea", 285), ("coffee", 967), ("camera", 872), ("motorcycle", 665)])
def test_photographs(name: str, label: int) -> None:
    """Egyptian cat, espresso, tripod, moped."""
    data = pytest.importorskip("skimage.data", reason="scikit-image, which has the photographs, is not installed")
    photograph = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    image = torch.from_numpy(photograph).view(*photograph.shape[:2], -1).permute(2, 0, 1)[None] / 127.5 - 1
    height, width = image.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, :, top : top + side, left : left + side]
    image = F.interpolate(square, size=(224, 224), mode="bilinear", antialias=True)
    assert EfficientNetLite0().logits(image).argmax().item() == label


def test_errors(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"taps: expected blocks .* got \(4, 2\)"):
        EfficientNetLite0((4, 2))
    with pytest.raises(ValueError, match="size: expected"):
        EfficientNetLite0(size=0)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 1 or 3, H, W\], got \[1, 2, 8, 8\]"):
        EfficientNetLite0()(torch.zeros(1, 2, 8, 8))
    changed = tmp_path / "changed.pth"
    changed.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"changed.pth: expected sha256 57934424.*, got "):
        EfficientNetLite0(path=changed)
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package")
    with pytest.raises(
        ConfigError, match=r"no_such_package/models/.* is not installed: install 'ctm_fast\[features\]'"
    ):
        EfficientNetLite0()


def test_read_weights_names_what_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    for content, expected, message in [
        ({"a": torch.zeros(2)}, {"a": (2,), "b": (1,)}, "tensor b is missing"),
        ({"a": torch.zeros(2)}, {"a": (3,)}, r"tensor a: expected shape \[3\], got \[2\]"),
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, {"a": (2,)}, "tensor c is not in the network"),
        ({"a": "text"}, {"a": (2,)}, "expected a dictionary of tensors, got a, a str"),
        ([1, 2], {"a": (2,)}, "expected a dictionary, got a list"),
        (Path("/"), {"a": (2,)}, "its pickle asks for pathlib"),
    ]:
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=f"weights.pth: {message}"):
            read_weights(file, expected)
    torch.save({"model": {"a": torch.ones(2, dtype=torch.float16), "head.b": torch.zeros(1)}}, file)
    assert torch.equal(read_weights(file, {"a": (2,)}, unused=("head.",))["a"], torch.ones(2))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"weights.pth: not a complete zip archive"):
        read_weights(file, {})
    with pytest.raises(CheckpointError, match="expected a file of weights, got a directory"):
        read_weights(tmp_path, {})
