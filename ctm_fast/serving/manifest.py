"""What a run of images was asked for, kept beside them: no image of another run is mixed with them."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctm_fast.errors import ConfigError
from ctm_fast.files import write_text

Manifest = Mapping[str, Any]
"""Plain JSON: version, network, seeds, and every option that the images depend on."""


def seeds_text(seeds: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``, so that one list has one text."""
    runs = itertools.groupby(enumerate(seeds), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(members) for _, members in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def beside(output: Path) -> Path:
    """Where the manifest of a folder or a file is."""
    return output.with_name(f"{output.name}.json")


def claim(path: Path, manifest: Manifest) -> None:
    """Write ``path``, or find that it says the same. Ranks may do so at once. ConfigError if it is of another run."""
    if not path.exists():
        write(path, manifest)
    check_same(path, manifest)


def write(path: Path, manifest: Manifest) -> None:
    """Replace ``path``, whole or not at all."""
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def check_same(path: Path, manifest: Manifest) -> None:
    """Raise ConfigError naming what differs unless ``path`` holds ``manifest``."""
    try:
        there = json.loads(path.read_text())
        if not isinstance(there, dict):
            raise ValueError(f"expected an object, got {there!r:.80}")
    except ValueError as error:
        raise ConfigError(f"--out: expected what a run of images wrote in {path}, got {error}") from error
    for key in [*manifest, *there]:
        if there.get(key) != manifest.get(key):
            raise ConfigError(
                f"--out: expected the place of a run like this one, got another's, which is not mixed with it: "
                f"{key} is {_short(there.get(key))} in {path}, {_short(manifest.get(key))} here"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
