"""A program out of a file, with the checks that the program itself does not make."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.serving.onnx_file import open_onnx
from ctm_fast.serving.program import Description
from ctm_fast.serving.pt2_file import open_pt2

_OPEN = {".pt2": open_pt2, ".onnx": open_onnx}


class Exported:
    """Images out of an exported program; calls change nothing.

    Args:
        description: what the program is and takes.
        run: takes its inputs in order, on its device, and gives the images.
    """

    def __init__(self, description: Description, run: Callable[..., Tensor]) -> None:
        self.description = description
        self._run = run

    def __call__(
        self,
        *,
        seeds: Tensor | None = None,
        x_T: Tensor | None = None,
        labels: Tensor | None = None,
        noises: Tensor | None = None,
    ) -> Tensor:
        """[B, C, H, W] float32 images in [-1, 1], on the program's device.

        Args:
            seeds: [B] int64, each 0 to 2^63 - 1, for a program that starts with seeds.
            x_T: [B, C, H, W] float32 at level sigma_max, for one that starts with images.
            labels: [B] int64 classes, for a conditional one.
            noises: [B, steps - 1, C, H, W] float32, N(0, I), for one of x_T that adds noise between its steps.

        Raises ConfigError naming the argument, before any work.
        """
        given = {"seeds": seeds, "x_T": x_T, "labels": labels, "noises": noises}
        about, size = self.description, (self.description.channels, *(self.description.resolution,) * 2)
        for name, tensor in given.items():
            if (tensor is not None) != (name in about.inputs):
                raise ConfigError(f"{name}: expected {', '.join(about.inputs)}, got {self._names(given)}")
        inputs = {name: tensor for name in about.inputs if isinstance(tensor := given[name], Tensor)}
        if len(inputs) != len(about.inputs):
            raise ConfigError(f"{', '.join(about.inputs)}: expected tensors, got {self._names(given)}")
        batch = len(inputs[about.start]) if inputs[about.start].dim() else 0
        if not about.batch_min <= batch <= about.batch_max:
            raise ConfigError(f"{about.start}: expected {about.batch_min} to {about.batch_max} images, got {batch}")
        _check("seeds", inputs, torch.int64, (batch,), 2**63 - 1)
        _check("x_T", inputs, torch.float32, (batch, *size))
        _check("labels", inputs, torch.int64, (batch,), about.num_classes - 1)
        _check("noises", inputs, torch.float32, (batch, about.noises, *size))
        return self._run(*(tensor.to(about.device) for tensor in inputs.values()))

    @staticmethod
    def _names(given: dict[str, Tensor | None]) -> str:
        return ", ".join(name for name, tensor in given.items() if tensor is not None) or "nothing"


def load_exported(path: str | Path) -> Exported:
    """The program in a .pt2 or .onnx of ``python -m ctm_fast.export``.

    A .pt2 holds native code that is run: open only what you trust.

    Raises CheckpointError naming the file, ConfigError where it needs what is not here.
    """
    path = Path(path)
    if path.suffix not in _OPEN:
        raise CheckpointError(f"{path}: expected a .pt2 or .onnx file")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got {'a directory' if path.is_dir() else 'no such file'}")
    return Exported(*_OPEN[path.suffix](path))


def _check(
    name: str, inputs: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...], highest: int | None = None
) -> None:
    """ConfigError unless the input ``name``, if there is one, is of that kind: in 0..highest, or finite."""
    if name not in inputs:
        return
    tensor = inputs[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ConfigError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if highest is None:
        if not tensor.isfinite().all():
            raise ConfigError(f"{name}: expected finite numbers, got others")
    elif tensor.min() < 0 or tensor.max() > highest:
        raise ConfigError(f"{name}: expected 0 to {highest}, got {int(tensor.min())} to {int(tensor.max())}")
