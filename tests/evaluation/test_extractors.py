"""Extractors: what they say of themselves, and that their features are their networks'."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ctm_fast.diffusion.images import to_float
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation import extractors
from ctm_fast.evaluation.extractors import Extractor, Features, weights_sha256
from ctm_fast.models.features import EfficientNetLite0, Inception
from tests.models.features.test_inception import random_weights


def pixels(n: int, size: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def test_efficientnet_lite0() -> None:
    images = pixels(2, 16)
    extractor = extractors.efficientnet_lite0()
    assert extractor.sha256.startswith("579344248a93e230")
    found = extractor(images)
    network = EfficientNetLite0()
    torch.testing.assert_close(found.pooled, network.pooled(to_float(images)))
    assert found.logits is not None and found.spatial is not None
    torch.testing.assert_close(found.logits, network.logits(to_float(images)))
    assert found.spatial.shape == (2, 7 * 14 * 14)
    assert extractor.title("frechet") == "Frechet distance"
    assert extractor.title("kid") == "kernel distance"


def test_inception(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(random_weights(), file)
    images = pixels(1, 16)
    extractor = extractors.inception(file)
    found, expected = extractor(images), Inception(file)(images)
    assert found.spatial is not None and found.logits is not None
    assert torch.equal(found.pooled, expected.pooled)
    assert torch.equal(found.spatial, expected.spatial.flatten(1))
    assert extractor.facts == {"form": "state dict"}
    assert len(extractor.sha256) == 64
    assert extractor.title("frechet") == "FID"


def test_in_domain() -> None:
    """Images told apart by their brightness; the last layer makes the logits of the features."""
    labels = torch.arange(200) % 2
    images = (pixels(200, 8, 1) // 4 + 150 * labels[:, None, None, None]).to(torch.uint8)
    extractor = extractors.in_domain(images, labels, num_classes=2, data="halves", seed=3, steps=60)
    found = extractor(images[:5])
    assert extractor.name == "indomain:halves"
    assert extractor.facts == {"data": "halves", "seed": 3, "held_out_accuracy": 1.0}
    assert found.pooled.shape == (5, 256)
    assert found.logits is not None
    assert found.logits.argmax(1).tolist() == labels[:5].tolist()
    with pytest.raises(
        ConfigError, match=r"expected \[1, 8, 8\], which indomain:halves was trained on, got \[1, 16, 16\]"
    ):
        extractor(pixels(1, 16, 1))


def test_a_module_of_ones_own() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout())
    extractor = extractors.from_module(module, "mine")
    images = pixels(3, 2)
    assert torch.equal(extractor(images).pooled, module(to_float(images)))
    assert not module.training
    with pytest.raises(ConfigError, match="name: expected another than efflite0"):
        extractors.from_module(module, "inception")
    with pytest.raises(ConfigError, match=r"extractor flat: expected features \[B, D\], got \[3, 3, 2, 2\]"):
        extractors.from_module(nn.Identity(), "flat")(images)


def test_the_hash_is_of_the_weights() -> None:
    module = nn.Linear(3, 2)
    before = weights_sha256(module)
    assert weights_sha256(module) == before
    with torch.no_grad():
        module.bias[1] += 1e-6
    assert weights_sha256(module) != before


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4).byte(), torch.zeros(3, 4, 4).byte()]
)
def test_refused(images: Tensor) -> None:
    extractor = Extractor("any", "0", "none", lambda x: Features(x.flatten(1).float()))
    with pytest.raises(ConfigError, match=r"images: expected uint8 \[B, 1 or 3, H, W\], got "):
        extractor(images)
