"""A model that is ready to sample: seeds in, images out."""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ctm_fast import runtime
from ctm_fast.diffusion.images import to_uint8
from ctm_fast.diffusion.schedule import Levels, sampler_sigmas
from ctm_fast.errors import CheckpointError, ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.samplers import generate, renoise_levels

Output = Literal["float", "uint8", "pil"]
_OUTPUTS = ("float", "uint8", "pil")
_MAX_SEED = 2**63 - 1


def load(path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Sampler":
    """A :class:`Sampler` of a snapshot.

    Args:
        path: a .safetensors file of a run, teacher or CTM.
        device: by default the first GPU, else the CPU.
        dtype: what the network computes in: float32 (the default), bfloat16 or float16.

    Raises CheckpointError naming the file, ConfigError for another dtype or a device that is not there.
    """
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    chosen = runtime.prepare(None if device is None else str(device), None)
    model, metadata = load_model(path, device=chosen, dtype=dtype)
    try:
        levels = Levels(**metadata["config"]["levels"])
    except (KeyError, TypeError, LevelError) as error:
        raise CheckpointError(f"{path}: expected the noise levels of the model in its metadata: {error!r}") from error
    return Sampler(model, levels)


class Sampler:
    """Images of seeds; the image of a seed does not depend on the others in the call. Calls change nothing.

    Args:
        model: a CTM, or an EDM denoiser (sampled by EDM's Heun solver).
        levels: the range of noise levels it was trained on.
        batch: how many images the network makes at once.
    """

    def __init__(self, model: CTM | EDMDenoiser, levels: Levels, *, batch: int = 256) -> None:
        self.model = model.eval()
        self.levels = levels
        self.batch = batch
        self.device = model.net.out_conv.weight.device

    @property
    def num_classes(self) -> int:
        """How many classes the model is conditioned on; 0 for an unconditional model."""
        return self.model.net.label_dim

    def __call__(
        self,
        seeds: Sequence[int],
        steps: int = 1,
        gamma: float = 0.0,
        labels: Sequence[int] | int | None = None,
        output: Output = "float",
    ) -> Tensor | list[Image.Image]:
        """The images of ``seeds``.

        Args:
            seeds: integers in 0..2^63 - 1, one image each.
            steps: jumps of gamma-sampling, one network evaluation each; levels of the Heun solver for a teacher.
            gamma: in [0, 1]: 0 is deterministic, 1 is consistency-model multistep. A teacher takes 0 only.
            labels: classes, one for each seed or one for all; by default seed modulo the number of classes.
            output: "float": [B, C, H, W] float32 in [-1, 1]; "uint8": [B, H, W, C], rounded; "pil": a list.

        Raises ConfigError or LevelError, naming the argument, before any work.
        """
        seeds = _integers("seeds", seeds, _MAX_SEED)
        (steps,) = _integers("steps", [steps], 10_000)
        if steps < 1:
            raise ConfigError("steps: expected an integer in 1..10000, got 0")
        if not isinstance(gamma, int | float):
            raise ConfigError(f"gamma: expected a number, got {gamma!r}")
        renoise_levels(sampler_sigmas(steps, self.levels).tolist(), gamma)
        if gamma and isinstance(self.model, EDMDenoiser):
            raise ConfigError(f"gamma: expected 0 for a teacher, whose solver is deterministic, got {gamma}")
        if output not in _OUTPUTS:
            raise ConfigError(f"output: expected one of {', '.join(_OUTPUTS)}, got {output!r}")
        classes = self.labels_of(seeds, labels)
        images = [
            generate(
                self.model,
                self.levels,
                torch.tensor(seeds[i : i + self.batch], dtype=torch.int64, device=self.device),
                None if classes is None else torch.tensor(classes[i : i + self.batch], device=self.device),
                steps=steps,
                gamma=gamma,
            )
            for i in range(0, len(seeds), self.batch)
        ]
        net = self.model.net
        empty = torch.empty(0, net.img_channels, net.img_resolution, net.img_resolution, device=self.device)
        x = torch.cat([empty, *images]).clamp(-1, 1)
        if output == "float":
            return x
        x8 = to_uint8(x).permute(0, 2, 3, 1).contiguous()
        if output == "uint8":
            return x8
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in x8.cpu().numpy()]

    def labels_of(self, seeds: Sequence[int], labels: Sequence[int] | int | None = None) -> list[int] | None:
        """The class of each seed's image, None for an unconditional model. ConfigError as for a call."""
        if self.num_classes == 0:
            if labels is not None:
                raise ConfigError("labels: expected None for an unconditional model, got labels")
            return None
        if labels is None:
            return [seed % self.num_classes for seed in seeds]
        given = labels if isinstance(labels, Iterable) else [labels] * len(seeds)
        classes = _integers("labels", given, self.num_classes - 1)
        if len(classes) != len(seeds):
            raise ConfigError(f"labels: expected {len(seeds)}, one for each seed, got {len(classes)}")
        return classes


def _integers(name: str, values: Iterable[object], highest: int) -> list[int]:
    """``values`` (of Python, NumPy or PyTorch) as Python integers; ConfigError unless all are in 0..highest."""
    if not isinstance(values, Iterable):
        raise ConfigError(f"{name}: expected a sequence of integers, got {values!r}")
    numbers = []
    for value in values:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = -1
        if not 0 <= number <= highest:
            raise ConfigError(f"{name}: expected integers in 0..{highest}, got {value!r}")
        numbers.append(number)
    return numbers
