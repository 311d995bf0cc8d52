"""A model that is ready to sample: seeds in, images out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ctm_fast import runtime
from ctm_fast.diffusion.images import to_uint8
from ctm_fast.diffusion.schedule import Levels, sampler_sigmas
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.samplers import generate, renoise_levels

Output = Literal["float", "uint8", "pil"]
_OUTPUTS = ("float", "uint8", "pil")
_MAX_SEED = 2**63 - 1


def load(
    path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> "Sampler":
    """A :class:`Sampler` of a snapshot.

    Args:
        path: a .safetensors file of a run, teacher or CTM.
        device: by default the first GPU, else the CPU.
        dtype: what the network computes in; float32 by default.

    Raises CheckpointError naming the file, ConfigError for a device that is not there.
    """
    chosen = runtime.prepare(None if device is None else str(device), None)
    model, metadata = load_model(path, device=chosen, dtype=dtype or torch.float32)
    try:
        levels = Levels(**metadata["config"]["levels"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the noise levels of the model in its metadata, got none") from error
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
    def numlabels_of(self) -> int:
        """0 for an unconditional model."""
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
            gamma: in [0, 1]: 0 is deterministic, 1 is consistency-model multistep.
            labels: classes, one for each seed or one for all; by default seed modulo the number of classes.
            output: "float": [B, C, H, W] float32 in [-1, 1]; "uint8": [B, H, W, C], rounded; "pil": a list.

        Raises ConfigError or LevelError, naming the argument, before any work.
        """
        seeds = list(seeds)
        for seed in seeds:
            if not isinstance(seed, int) or not 0 <= seed <= _MAX_SEED:
                raise ConfigError(f"seeds: expected integers in 0..2^63-1, got {seed!r}")
        if not isinstance(steps, int) or not 1 <= steps <= 10_000:
            raise ConfigError(f"steps: expected an integer in 1..10000, got {steps!r}")
        renoise_levels(sampler_sigmas(steps, self.levels).tolist(), gamma)
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
        classes = [labels] * len(seeds) if isinstance(labels, int) else list(labels)
        if len(classes) != len(seeds):
            raise ConfigError(f"labels: expected {len(seeds)}, one for each seed, got {len(classes)}")
        for label in classes:
            if not isinstance(label, int) or not 0 <= label < self.num_classes:
                raise ConfigError(f"labels: expected integers in 0..{self.num_classes - 1}, got {label!r}")
        return classes
