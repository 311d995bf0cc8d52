"""LPIPS' files with random weights: for what does not depend on the real ones, which are not ours to give away."""

from pathlib import Path

import torch

CHANNELS = (64, 128, 256, 512, 512)
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def write_random_files(folder: Path) -> tuple[Path, Path]:
    """A backbone under torchvision's names, heads under those of lpips 0.1.4."""
    generator = torch.Generator().manual_seed(0)
    backbone = {}
    for place, inputs, outputs in zip(PLACES, WIDTHS[:-1], WIDTHS[1:], strict=True):
        scale = (2 / (9 * inputs)) ** 0.5
        backbone[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        backbone[f"features.{place}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    torch.save(backbone, folder / "vgg16.pth")
    heads = {
        f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for index, width in enumerate(CHANNELS)
    }
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg16.pth", folder / "heads.pth"
