"""Numbers that the published code gave, and what agreeing with them means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctm_fast.models import CTM, EDMDenoiser, from_published

DIRECTORY = Path(__file__).parent / "golden"


class Golden:
    """One file of golden arrays: ``golden["x"]`` is a tensor, ``golden.model("w")`` the model under a prefix."""

    def __init__(self, name: str) -> None:
        with np.load(DIRECTORY / name) as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(str(file["meta"]))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def get(self, key: str) -> Tensor | None:
        return self[key] if key in self.arrays else None

    @property
    def tolerance(self) -> float:
        """Of a float32 result: half an ulp of the 250 ln t that ADM is told moves its output by 1.7e-5."""
        return 1e-4 if self.meta.get("arch") == "adm" else 1e-5

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The published state dict under ``prefix``."""
        return {key.removeprefix(f"{prefix}/"): self[key] for key in self.arrays if key.startswith(f"{prefix}/")}

    def model(self, prefix: str) -> CTM | EDMDenoiser:
        """The model of the state dict under ``prefix``, in eval mode."""
        return from_published(self.tensors(prefix), self.meta).eval()

    def student(self, prefix: str) -> CTM:
        model = self.model(prefix)
        assert isinstance(model, CTM)
        return model

    def teacher(self, prefix: str) -> EDMDenoiser:
        model = self.model(prefix)
        assert isinstance(model, EDMDenoiser)
        return model


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Per sample, max|a - b| <= tolerance * max|b|."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().flatten(1).amax(1) if actual.dim() > 1 else (actual - expected).abs()
    scale = expected.abs().flatten(1).amax(1) if actual.dim() > 1 else expected.abs()
    worst = (difference / scale).max().item()
    assert worst <= tolerance, f"relative difference {worst:.2e} > {tolerance:.0e}"
