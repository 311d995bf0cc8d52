"""The compiled libraries beside the package: what is there, what is loaded, and why one is not.

``libctm_fast_ops.so`` holds the schemas and the CPU kernels, ``libctm_fast_cuda.so`` the CUDA kernels; the second is
opened only where torch has CUDA. A library that is there and does not load is an error: falling back in silence would
hide a broken installation. ``CTM_FAST_LIBRARIES=0`` leaves them closed, as if nothing had been built: for tests.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).parent / "lib"
FILES = {"cpu": "libctm_fast_ops.so", "cuda": "libctm_fast_cuda.so"}
_CLOSED = os.environ.get("CTM_FAST_LIBRARIES") == "0"
_loaded: set[str] = set()


def load() -> None:
    """Open the libraries that are there. Raises ImportError naming the file if one does not load."""
    if _CLOSED:
        return
    for device, file in FILES.items():
        path = DIRECTORY / file
        if not path.exists() or (device == "cuda" and torch.version.cuda is None):
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"ctm_fast: {path} does not load into torch {torch.__version__} ({error}); "
                "rebuild it with `pip install -e .`, or delete it to run without"
            ) from error
        _loaded.add(device)


def missing(device: str) -> str | None:
    """Why there are no C++ kernels for ``device`` ("cpu" or "cuda"), in words; None where they are loaded."""
    if device in _loaded:
        return None
    if device not in FILES:
        return f"there are no C++ kernels for {device}"
    if _CLOSED:
        return "CTM_FAST_LIBRARIES=0 leaves the libraries closed"
    if device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    reason = build_note().get("missing", {}).get(device)
    return f"{FILES[device]} was not built" + (f": {reason}" if reason else "")


def build_note() -> dict[str, Any]:
    """What setup.py wrote into ``lib/build.json``; empty where nothing was installed from this directory."""
    note = DIRECTORY / "build.json"
    return json.loads(note.read_text()) if note.exists() else {}
