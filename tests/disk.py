"""A file system of its own, of few bytes or read-only, for as long as a test needs it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, size: str, *options: str) -> Iterator[None]:
    """A tmpfs of ``size`` on ``directory``; skips, with the reason, where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    done = mount("-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(directory))
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    """mount(8)."""
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
