"""TensorFlow's Inception against its own equations in float64, on random weights under torch-fidelity's names."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features import Inception, load_inception
from ctm_fast.models.features import inception as module
from ctm_fast.models.features.inception import is_torchscript, resize_tensorflow

STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
}  # fmt: skip


def block_a(c: int, pooled: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (64, c, 1, 1), "branch5x5_1": (48, c, 1, 1), "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, c, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pooled, c, 1, 1),
    }  # fmt: skip


def block_c(w: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (192, 768, 1, 1), "branch7x7_1": (w, 768, 1, 1), "branch7x7_2": (w, w, 1, 7),
        "branch7x7_3": (192, w, 7, 1), "branch7x7dbl_1": (w, 768, 1, 1), "branch7x7dbl_2": (w, w, 7, 1),
        "branch7x7dbl_3": (w, w, 1, 7), "branch7x7dbl_4": (w, w, 7, 1), "branch7x7dbl_5": (192, w, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }  # fmt: skip


def block_e(c: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (320, c, 1, 1), "branch3x3_1": (384, c, 1, 1), "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1), "branch3x3dbl_1": (448, c, 1, 1), "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1), "branch_pool": (192, c, 1, 1),
    }  # fmt: skip


BLOCKS = {
    "Mixed_5b": block_a(192, 32), "Mixed_5c": block_a(256, 64), "Mixed_5d": block_a(288, 64),
    "Mixed_6a": {
        "branch3x3": (384, 288, 3, 3), "branch3x3dbl_1": (64, 288, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": {
        "branch3x3_1": (192, 768, 1, 1), "branch3x3_2": (320, 192, 3, 3), "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7), "branch7x7x3_3": (192, 192, 7, 1), "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": block_e(1280), "Mixed_7c": block_e(2048),
}  # fmt: skip
CONVS = STEM | {f"{block}.{name}": shape for block, convs in BLOCKS.items() for name, shape in convs.items()}


def random_weights() -> dict[str, Tensor]:
    """Of a scale that keeps activations alive, with statistics and shifts that count."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in CONVS.items():
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        tensors[f"{name}.bn.weight"] = torch.ones(shape[0])
        tensors[f"{name}.bn.bias"] = torch.randn(shape[0], generator=generator) * 0.3
        tensors[f"{name}.bn.running_mean"] = torch.randn(shape[0], generator=generator) * 0.3
        tensors[f"{name}.bn.running_var"] = torch.rand(shape[0], generator=generator) + 0.5
    tensors["fc.weight"] = torch.randn(1008, 2048, generator=generator) * 0.02
    tensors["fc.bias"] = torch.randn(1008, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.save(random_weights(), file)
    return file


@pytest.fixture(scope="module")
def network(path: Path) -> Inception:
    return Inception(path)


def tensorflow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C]: pixel by pixel, as TensorFlow 1's ResizeBilinear with neither corners aligned nor centres halved."""
    height, width, _ = image.shape
    out = np.empty((size, size, image.shape[2]))
    for i in range(size):
        y = i * height / size
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(size):
            x = j * width / size
            left, right = int(x), min(int(x) + 1, width - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            out[i, j] = upper * (1 - y + top) + lower * (y - top)
    return out


@pytest.mark.parametrize("shape", [(8, 8), (32, 20), (64, 64), (299, 299), (400, 512)])
def test_resize(shape: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.randint(256, (1, 2, *shape), generator=generator).float()
    expected = tensorflow_resize(images[0].permute(1, 2, 0).double().numpy(), 299)
    found = resize_tensorflow(images)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-2)  # 512 in float32, times 255


def test_resize_is_what_nvidia_computes(generator: torch.Generator) -> None:
    """A sampling grid moved by half an input pixel less half an output pixel."""
    images = torch.rand(2, 3, 32, 24, generator=generator, dtype=torch.float64)
    theta = torch.eye(2, 3, dtype=torch.float64)
    theta[0, 2] += 1 / 24 - 1 / 299
    theta[1, 2] += 1 / 32 - 1 / 299
    grid = F.affine_grid(theta.expand(2, 2, 3), [2, 3, 299, 299], align_corners=False)
    expected = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(resize_tensorflow(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [32, 400])
def test_other_resizes_are_found(antialias: bool, size: int, generator: torch.Generator) -> None:
    """Planted fault: the usual resize, antialiased or not, is off by grey levels, where TensorFlow's is by 0.01."""
    images = torch.randint(256, (1, 3, size, size), generator=generator).float()
    other = F.interpolate(images, size=(299, 299), mode="bilinear", antialias=antialias)
    expected = tensorflow_resize(images[0].permute(1, 2, 0).double().numpy(), 299)
    assert np.abs(other[0].permute(1, 2, 0).numpy() - expected).mean() > 1


def equations(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and the first channels of mixed_6/conv, of resized images in [-1, 1]."""

    def conv(name: str, x: Tensor, stride: int = 1, same: bool = True) -> Tensor:
        w, gamma, beta, mean, var = (
            tensors[f"{name}.{part}"]
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        x = F.conv2d(x, w, stride=stride, padding=tuple(k // 2 for k in w.shape[2:]) if same else 0)
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + 0.001).sqrt()
        return (scaled * gamma[:, None, None] + beta[:, None, None]).clamp(min=0)

    def average(x: Tensor) -> Tensor:
        """Over the pixels that are there: 4 in a corner, 6 at an edge."""
        ones = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        flat = x.flatten(0, 1)[:, None]
        return (F.conv2d(flat, ones, padding=1) / F.conv2d(torch.ones_like(flat), ones, padding=1)).view_as(x)

    def chain(block: str, stem: str, x: Tensor, parts: int, last_stride: int = 1) -> Tensor:
        for part in range(1, parts + 1):
            last = part == parts and last_stride == 2
            x = conv(f"{block}.{stem}_{part}", x, last_stride if last else 1, not last)
        return x

    x = conv("Conv2d_1a_3x3", x, 2, same=False)
    x = conv("Conv2d_2a_3x3", x, same=False)
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), same=False), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [conv(f"{block}.branch1x1", x), chain(block, "branch5x5", x, 2), chain(block, "branch3x3dbl", x, 3)]
        x = torch.cat([*parts, conv(f"{block}.branch_pool", average(x))], 1)
    parts = [conv("Mixed_6a.branch3x3", x, 2, same=False), chain("Mixed_6a", "branch3x3dbl", x, 3, 2)]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        parts = [conv(f"{block}.branch1x1", x), chain(block, "branch7x7", x, 3), chain(block, "branch7x7dbl", x, 5)]
        if block == "Mixed_6d":
            spatial = parts[0][:, :7]
        x = torch.cat([*parts, conv(f"{block}.branch_pool", average(x))], 1)
    parts = [chain("Mixed_7a", "branch3x3", x, 2, 2), chain("Mixed_7a", "branch7x7x3", x, 4, 2)]
    x = torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        once = conv(f"{block}.branch3x3_1", x)
        twice = chain(block, "branch3x3dbl", x, 2)
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        parts = [conv(f"{block}.branch1x1", x)]
        parts += [conv(f"{block}.branch3x3_{side}", once) for side in ("2a", "2b")]
        parts += [conv(f"{block}.branch3x3dbl_{side}", twice) for side in ("3a", "3b")]
        x = torch.cat([*parts, conv(f"{block}.branch_pool", pooled)], 1)
    return x.mean((2, 3)), spatial


def test_equations(network: Inception, generator: torch.Generator) -> None:
    images = torch.randint(256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tensors = {name: tensor.double() for name, tensor in random_weights().items()}
    resized = torch.from_numpy(tensorflow_resize(images[0].permute(1, 2, 0).double().numpy(), 299))
    pooled, spatial = equations(tensors, (resized.permute(2, 0, 1)[None] - 128) / 128)
    found = network(images)
    for name, got, expected in (
        ("pooled", found.pooled, pooled),
        ("spatial", found.spatial, spatial),
        ("logits", found.logits, pooled @ tensors["fc.weight"].T),
    ):
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name
    assert pooled.std() > 0.01


def test_parameters(network: Inception) -> None:
    """As many as the published network has: 21,785,568 in the convolutions, and 1,008 classes; 472 tensors."""
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 + 2048 * 1008 + 1008
    assert len(random_weights()) == 94 * 5 + 2
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


def test_grey_images_and_floats(network: Inception, generator: torch.Generator) -> None:
    grey = torch.randint(256, (1, 1, 16, 16), generator=generator, dtype=torch.uint8)
    colour = network(grey.expand(-1, 3, -1, -1)).pooled
    assert torch.equal(network(grey).pooled, colour)
    assert torch.equal(network(grey.float()).pooled, colour)


class Script(nn.Module):
    """What NVIDIA's archive answers to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        if not return_features:
            raise ValueError("features are asked for")
        return img.float().mean((1, 2, 3))[:, None].expand(-1, self.width)


def test_the_form_is_told_by_the_content(path: Path, tmp_path: Path) -> None:
    """A state dict and an archive of code under the same name."""
    script = tmp_path / path.name
    torch.jit.script(Script(2048)).save(str(script))
    assert is_torchscript(script) and not is_torchscript(path)
    scripted, form = load_inception(script)
    assert form == "TorchScript, whose code was run"
    assert scripted(torch.full((2, 1, 8, 8), 7, dtype=torch.uint8)).shape == (2, 2048)


def test_a_state_dict_runs_no_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.load or torch.jit.load was called")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(torch.jit, "load", never)
    network, form = load_inception(path)
    assert form == "state dict" and isinstance(network, Inception)


def test_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.pt: expected a file of weights, got no such file"):
        load_inception(tmp_path / "none.pt")
    lacking = random_weights()
    del lacking["Mixed_7c.branch_pool.bn.bias"]
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match=r"lacking.pt: tensor Mixed_7c.branch_pool.bn.bias is missing"):
        load_inception(tmp_path / "lacking.pt")
    torch.save({**random_weights(), "AuxLogits.fc.bias": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt: tensor AuxLogits.fc.bias is not in the network"):
        load_inception(tmp_path / "other.pt")
    torch.jit.script(Script(64)).save(str(tmp_path / "narrow.pt"))
    with pytest.raises(CheckpointError, match=r"narrow.pt: expected features \[1, 2048\], got \[1, 64\]"):
        load_inception(tmp_path / "narrow.pt")
    torch.jit.script(nn.Linear(3, 3)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(CheckpointError, match=r"linear.pt: not a TorchScript Inception: "):
        load_inception(tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match="expected a TorchScript archive, got another file"):
        module.ScriptedInception(path)


def test_counters_of_batches_may_be_there(network: Inception, tmp_path: Path, generator: torch.Generator) -> None:
    counters = {f"{name}.bn.num_batches_tracked": torch.tensor(3) for name in CONVS}
    torch.save({**random_weights(), **counters}, tmp_path / "with.pt")
    images = torch.randint(256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8)
    assert torch.equal(Inception(tmp_path / "with.pt")(images).pooled, network(images).pooled)
