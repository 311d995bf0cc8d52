"""A model that is ready to sample: seeds in, images out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ctm_fast import runtime
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import CheckpointError, ConfigError, LevelError
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.models.repository import weights_file
from ctm_fast.serving.engine import Engine
from ctm_fast.serving.pixels import to_pictures
from ctm_fast.serving.request import Integers, Output, check_integers, check_labels, check_plan, check_request
from ctm_fast.serving.server import Server

MAX_BATCH = 65_536


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    threads: int | None = None,
) -> "Sampler":
    """A :class:`Sampler` of a snapshot.

    From then on float32 products of the whole process are TF32's on a GPU that has them, as in training.

    Args:
        path_or_hub_id: a .safetensors file of a run, teacher or CTM; a folder with ``model.safetensors``; or
            ``user/name`` on the Hugging Face Hub (extra ``hub``), unless there is such a path.
        device: by default the first GPU, else the CPU.
        dtype: what the network computes in: float32 (the default), bfloat16 or float16.
        threads: CPU threads of the process; None leaves them.

    Raises CheckpointError naming the file, ConfigError for another dtype or a device that is not there.
    """
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    chosen = runtime.find_device(None if device is None else str(device))
    runtime.prepare(threads)
    path = weights_file(path_or_hub_id)
    model, metadata = load_model(path, device=chosen, dtype=dtype)
    try:
        levels = Levels(**metadata["config"]["levels"])
    except (KeyError, TypeError, LevelError) as error:
        raise CheckpointError(f"{path}: expected the noise levels of the model in its metadata: {error!r}") from error
    return Sampler(model, levels)


class Sampler:
    """Images of seeds; the image of a seed does not depend on the others in the call.

    A call changes nothing: any number of threads may call at once.

    Args:
        model: a CTM, or an EDM denoiser (sampled by EDM's Heun solver).
        levels: the range of noise levels it was trained on.
        batch: how many images the network makes at once.
    """

    def __init__(self, model: CTM | EDMDenoiser, levels: Levels, *, batch: int = 256) -> None:
        _check_sizes("batch", [batch])
        self.model = model.eval()
        self.levels = levels
        self._engine = Engine(self.model, levels, batch)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._engine.device

    @property
    def batch(self) -> int:
        """How many images the network makes at once."""
        return self._engine.batch

    @property
    def num_classes(self) -> int:
        """How many classes the model is conditioned on; 0 for an unconditional model."""
        return self.model.net.label_dim

    def __call__(
        self,
        seeds: Integers,
        steps: int | None = None,
        gamma: float = 0.0,
        labels: Integers | int | None = None,
        output: Output = "float",
        *,
        sigmas: Iterable[float] | None = None,
        guidance: float | None = None,
    ) -> Tensor | list[Image.Image]:
        """The images of ``seeds``.

        Args:
            seeds: integers in 0..2^63 - 1, one image each.
            steps: jumps of gamma-sampling, one network evaluation each; levels of the Heun solver for a teacher. By
                default 1.
            gamma: in [0, 1]: 0 is deterministic, 1 is consistency-model multistep. A teacher takes 0 only.
            labels: classes, one for each seed or one for all; by default seed modulo the number of classes.
            output: "float": [B, C, H, W] float32 in [-1, 1] on the device; "uint8": [B, H, W, C], rounded, on the CPU;
                "pil": a list.
            sigmas: noise levels in place of those of ``steps``, strictly decreasing, within those of the model: a CTM
                jumps from each to the next (two at least), a teacher's solver goes on from the last to 0. The noise
                starts at the first.
            guidance: weight of classifier-free guidance, for a model trained with label dropout, at twice the cost: 1
                is none, more is closer to the class.

        Raises ConfigError or LevelError, both ValueErrors, naming the argument, before any work.
        """
        plan = check_plan(self.model, self.levels, steps, gamma, sigmas, guidance)
        request = check_request(self.model, seeds, plan, labels, output)
        uint8 = request.output != "float"
        x = self._engine.run(request.seeds, request.labels, plan, uint8=uint8)
        return to_pictures(x) if request.output == "pil" else x

    def labels_of(self, seeds: Sequence[int], labels: Integers | int | None = None) -> list[int] | None:
        """The class of each seed's image, None for an unconditional model. ConfigError as for a call."""
        return check_labels(self.model, seeds, labels)

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1, 8, 64),
        *,
        steps: int | None = None,
        gamma: float = 0.0,
        sigmas: Iterable[float] | None = None,
        guidance: float | None = None,
    ) -> str:
        """Make the calls to come fast, and say how: once, after loading, before other threads call.

        On a CUDA device, calls with these ``steps``, ``gamma``, ``sigmas`` and ``guidance`` are from now on one graph
        for each batch, with as many rows as the smallest of ``batch_sizes`` that holds it; more images than the largest
        take several. Other options are launched kernel by kernel, as without a warm-up.

        On a CPU, the convolutions' weights are laid out once as their kernels want them, whatever the options; nothing
        is padded. In float32 that takes four times their memory besides, or once again on a CPU without AVX2 and in
        bfloat16. Later changes of the model's weights are not seen.

        Images are the same as before, to rounding. Raises ConfigError or LevelError as for a call.
        """
        plan = check_plan(self.model, self.levels, steps, gamma, sigmas, guidance)
        return self._engine.warmup(_check_sizes("batch_sizes", batch_sizes), plan)

    def serve(self, max_batch: int = 64, max_wait_ms: float = 5.0, max_queue: int = 1024) -> Server:
        """A running :class:`Server`, which answers requests from many threads in common batches.

        Args:
            max_batch: images made at once, and the most that one request may ask for.
            max_wait_ms: how long the first request of a batch waits for others to fill it.
            max_queue: images that may wait; more are refused with QueueFullError.

        Raises ConfigError naming the argument.
        """
        return Server(self._engine, max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue)


def _check_sizes(name: str, sizes: Sequence[int]) -> list[int]:
    checked = check_integers(name, sizes, MAX_BATCH)
    if not checked or 0 in checked:
        raise ConfigError(f"{name}: expected integers in 1..{MAX_BATCH}, got {list(sizes)}")
    return checked
