"""The model that an option of a command names, and which file it was."""

from pathlib import Path

import torch

from ctm_fast.errors import CheckpointError
from ctm_fast.files import file_sha256
from ctm_fast.models.repository import weights_file
from ctm_fast.serving.sampler import Sampler, load


def load_network(
    option: str,
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    threads: int | None = None,
) -> tuple[Sampler, str]:
    """As :func:`ctm_fast.serving.load`, and the SHA-256 of the file that was read. Errors of it name ``option``."""
    try:
        path = weights_file(path_or_hub_id)
        return load(path, device, dtype, threads=threads), file_sha256(path)
    except CheckpointError as error:
        raise CheckpointError(f"{option} {error}") from error
