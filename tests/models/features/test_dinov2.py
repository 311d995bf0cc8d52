"""DINOv2 against its equations in float64, on random weights under Meta's names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features import DINOv2
from ctm_fast.models.features.dinov2 import positions

W, HEADS = 384, 6
BLOCK = {
    "norm1.weight": (W,), "norm1.bias": (W,), "attn.qkv.weight": (3 * W, W), "attn.qkv.bias": (3 * W,),
    "attn.proj.weight": (W, W), "attn.proj.bias": (W,), "ls1.gamma": (W,), "norm2.weight": (W,), "norm2.bias": (W,),
    "mlp.fc1.weight": (4 * W, W), "mlp.fc1.bias": (4 * W,), "mlp.fc2.weight": (W, 4 * W), "mlp.fc2.bias": (W,),
    "ls2.gamma": (W,),
}  # fmt: skip
SHAPES = {
    "cls_token": (1, 1, W), "pos_embed": (1, 1370, W), "mask_token": (1, W),
    "patch_embed.proj.weight": (W, 3, 14, 14), "patch_embed.proj.bias": (W,),
    **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()},
    "norm.weight": (W,), "norm.bias": (W,),
}  # fmt: skip


def random_weights() -> dict[str, Tensor]:
    """Views of one table of random numbers, so that the file is small."""
    table = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 0.05
    tensors = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        start = 7919 * index % (len(table) - count)
        view = table[start : start + count].view(shape)
        tensors[name] = 1 + view if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")) else view
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(random_weights(), file)
    return file


def equations(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """The normalised class token; images [1, 3, 224, 224], normalised."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    patches = images.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(256, 588)
    embedded = patches @ tensors["patch_embed.proj.weight"].reshape(W, 588).T + tensors["patch_embed.proj.bias"]
    x = torch.cat([tensors["cls_token"][0], embedded]) + positions(tensors["pos_embed"])[0]
    for index in range(12):
        name = f"blocks.{index}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").view(257, 3, HEADS, 64).permute(1, 2, 0, 3)
        heads = ((q @ k.transpose(1, 2) / 8).softmax(-1) @ v).transpose(0, 1).reshape(257, W)
        x = x + tensors[f"{name}.ls1.gamma"] * linear(heads, f"{name}.attn.proj")
        h = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + tensors[f"{name}.ls2.gamma"] * linear(h * 0.5 * (1 + torch.erf(h / 2**0.5)), f"{name}.mlp.fc2")
    return norm(x[:1], "norm")


def test_class_token(path: Path, generator: torch.Generator) -> None:
    """Of an image of 28 pixels, resized by Pillow channel by channel, in its floating-point mode."""
    images = torch.rand(1, 3, 28, 28, generator=generator) * 2 - 1
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for plane in images[0]
    ]
    resized = torch.from_numpy(np.stack(planes)).double()[None]
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tensors = {name: tensor.double() for name, tensor in random_weights().items()}
    expected = equations(tensors, ((resized + 1) / 2 - mean) / std)
    found = DINOv2(path)(images)
    assert found.shape == (1, W)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_positions() -> None:
    """A ramp over 37x37, by cubic convolution (a = -0.75) at (i + 1/2) 37 / 16.1 - 1/2; by 16 it is 0.2 off."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows = torch.arange(37.0).repeat_interleave(37)
    embedding = torch.cat([torch.full((1,), -5.0), rows])[None, :, None]
    found = positions(embedding)[0, :, 0]
    assert found[0] == -5
    places = [(i + 0.5) * 37 / 16.1 - 0.5 for i in range(1, 15)]
    expected = torch.tensor([sum(j * kernel(place - j) for j in range(37)) for place in places])
    torch.testing.assert_close(found[1:].view(16, 16)[1:-1, 3], expected, rtol=0, atol=1e-4)


def test_errors(path: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: expected a DINOv2 of .*, got 0 blocks of width 0"):
        DINOv2(tmp_path / "other.pth")
    torch.save({**random_weights(), "register_tokens": torch.zeros(1, 4, W)}, tmp_path / "registers.pth")
    with pytest.raises(CheckpointError, match=r"registers.pth: tensor register_tokens is not in the network"):
        DINOv2(tmp_path / "registers.pth")
    with pytest.raises(CheckpointError, match="expected a file of weights, got no such file"):
        DINOv2(tmp_path / "none.pth")
