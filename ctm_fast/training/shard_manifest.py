"""What is in a directory of shards: what was told of it, and a checksum of every file. Read by one rank alone."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctm_fast.errors import CheckpointError
from ctm_fast.files import write_text

_MANIFEST = "about.json"
_CHUNK = 2**20  # bytes read at once


def write_manifest(directory: Path, about: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    """Complete ``directory``; ``about`` is any JSON, ``checksums`` those of its files by name."""
    text = json.dumps({"about": dict(about), "crc32": dict(checksums)})
    write_text(directory / _MANIFEST, text)


def read_about(directory: Path) -> dict[str, Any]:
    """What was told of ``directory``; CheckpointError if it is not there."""
    return dict(_read(directory)["about"])


def check_shards(directory: Path) -> None:
    """Raise CheckpointError naming the first file that is missing, or is not as it was written. Reads all of them."""
    for name, expected in _read(directory)["crc32"].items():
        try:
            found = checksum(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory}: could not be read: {error}") from error
        if found != expected:
            raise CheckpointError(f"{directory}: the checksum of {name} is wrong")


def shard_files(directory: Path) -> Sequence[Path]:
    """The files of tensors in ``directory``, in one order on every rank."""
    return sorted(directory.glob("*.safetensors"))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        return {key: dict(manifest[key]) for key in ("about", "crc32")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: expected a checkpoint with {_MANIFEST}, got {error}") from error
