"""Where the weights of a model are: a file, a folder laid out as on the Hugging Face Hub, or a repository there."""

import re
from pathlib import Path
from typing import Any

from ctm_fast.errors import CheckpointError, reason

try:
    import huggingface_hub
except ImportError:
    huggingface_hub = None  # type: ignore[assignment]  # download() says so

WEIGHTS = "model.safetensors"
"""The name of the weights in a folder or repository."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def weights_file(place: str | Path) -> Path:
    """The file of weights at ``place``: a file, a folder with ``model.safetensors``, or ``user/name`` on the Hub.

    A path that is there is never looked for on the Hub, nor is one that ends in .safetensors. What cannot be either is
    returned as it is: whoever opens it says what is wrong. Raises CheckpointError as :func:`download` does.
    """
    path = Path(place)
    try:
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        there = path.exists()
    except OSError:  # a name that no file can have
        return path
    if there or path.suffix == ".safetensors" or not _REPOSITORY.fullmatch(str(place)):
        return path
    return download(str(place))


def download(repository: str, **options: Any) -> Path:
    """``model.safetensors`` of ``user/name``, from the cache of huggingface_hub or through the network.

    ``options`` are those of ``huggingface_hub.hf_hub_download``: revision, cache_dir, token, local_files_only...

    Raises CheckpointError naming the repository if it cannot be reached or has no such file, or if the extra ``hub``
    is not installed.
    """
    expected = f"{repository}: expected a file, a folder or a repository of the Hub"
    if huggingface_hub is None:
        raise CheckpointError(f"{expected}: no such path, and a repository needs: pip install ctm_fast[hub]")
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repository, filename=WEIGHTS, **options))
    except Exception as error:  # no network, no such repository, no right to read it
        raise CheckpointError(f"{expected}: {reason(error)}") from error
