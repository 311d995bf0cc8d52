"""Where a result is from: commit, machine, versions, and how busy the machine was."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from ctm_fast import __version__
from ctm_fast.runtime import cpu_name

_SOURCES = {
    "digits": "scikit-learn's handwritten digits",
    "fashion-mnist": "Fashion-MNIST (Debian's package dataset-fashion-mnist)",
}


def data_title(name: str) -> str:
    """What the data set ``name`` is called in a result."""
    return _SOURCES.get(name, name)


def commit() -> str:
    """The commit of the code that runs, with a word on changes; ``unknown`` outside a repository."""
    root = Path(__file__).parent.parent.parent
    found = _git(root, "rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    return f"{found} with uncommitted changes" if _git(root, "status", "--porcelain", "ctm_fast", "csrc") else found


def machine(device: torch.device) -> str:
    """Device, threads and versions, in one line."""
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return (
        f"{where}, {threads} CPU thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores, ctm_fast {__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def load() -> float:
    """Processes that want a core, in the mean over the last 15 minutes, over the cores that there are."""
    return os.getloadavg()[2] / (os.cpu_count() or 1)


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
