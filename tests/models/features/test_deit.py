"""DeiT against its equations in float64, on random weights under timm's names."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features import DeiT, feature_shapes

BLOCK = {
    "norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,),
    "attn.proj.weight": (768, 768), "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
    "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,),
}  # fmt: skip
SHAPES = {
    "cls_token": (1, 1, 768), "dist_token": (1, 1, 768), "pos_embed": (1, 198, 768),
    "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
    **{f"blocks.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()},
    "norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,),
    "head_dist.weight": (1000, 768), "head_dist.bias": (1000,),
}  # fmt: skip


def random_weights() -> dict[str, Tensor]:
    """Views of one table of random numbers, so that the file is small; tokens and norms about as large as trained."""
    table = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)) * 0.04
    tensors = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        start = 7919 * index % (len(table) - count)
        view = table[start : start + count].view(shape)
        if name.endswith(("token", "pos_embed")):
            view = 25 * view
        tensors[name] = 1 + view if "norm" in name and name.endswith("weight") else view
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save({"model": random_weights()}, file)
    return file


def equations(tensors: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Tokens after blocks 2, 5, 8, 11; images [1, 3, 224, 224] normalised."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(196, 768)
    embedded = patches @ tensors["patch_embed.proj.weight"].reshape(768, 768).T + tensors["patch_embed.proj.bias"]
    x = torch.cat([tensors["cls_token"][0], tensors["dist_token"][0], embedded]) + tensors["pos_embed"][0]
    taps = []
    for index in range(12):
        name = f"blocks.{index}"
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").view(198, 3, 12, 64).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / 8).softmax(-1)
        x = x + linear((weights @ v).transpose(0, 1).reshape(198, 768), f"{name}.attn.proj")
        h = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + linear(h * 0.5 * (1 + torch.erf(h / 2**0.5)), f"{name}.mlp.fc2")
        if index in (2, 5, 8, 11):
            taps.append(x[2:])
    return taps


def test_maps(path: Path, generator: torch.Generator) -> None:
    images = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    resized = F.interpolate(images.double(), size=(224, 224), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tensors = {name: tensor.double() for name, tensor in random_weights().items()}
    got = DeiT(path)(images)
    for feature, tokens in zip(got, equations(tensors, ((resized + 1) / 2 - mean) / std), strict=True):
        assert feature.shape == (1, 768, 14, 14)
        expected = tokens.T.view(1, 768, 14, 14)
        assert (feature - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_file_is_read_whole(path: Path) -> None:
    net = DeiT(path)
    assert net.published_shapes() == SHAPES
    assert len(SHAPES) == 155
    assert sum(torch.Size(shape).numel() for shape in SHAPES.values()) == 87_338_192
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert feature_shapes(net, 32) == [(768, 14, 14)] * 4


def test_errors(path: Path, tmp_path: Path) -> None:
    tensors = random_weights()
    tensors["blocks.3.attn.qkv.weight"] = torch.zeros(3, 3)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"other.pth: tensor blocks.3.attn.qkv.weight: expected shape \[2304, 768\]"
    ):
        DeiT(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"deit.safetensors: expected a file of weights, got no such file"):
        DeiT(tmp_path / "deit.safetensors")
