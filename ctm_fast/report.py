"""What runs here: ``python -m ctm_fast.report [--json]``.

The machine, the versions, the compiled libraries, and for each op and device the kernel that serves it, eagerly and
inside ``torch.compile``, with the reason why each kernel that would come before it does not.
"""

import argparse
import importlib.machinery
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ctm_fast
from ctm_fast import _libraries, ops, runtime
from ctm_fast.ops import _library

# Beside this file, not anywhere on the path: another installation's would tell of another build.
HAS_BUILD_INFO = any(
    Path(__file__).with_name(f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES
)
if HAS_BUILD_INFO:  # not try: a module that is there and does not load is an error
    from ctm_fast import _C

WHERE = {
    "cpu": ("cpu", False),
    "cpu, compiled": ("cpu", True),
    "cuda": ("cuda", False),
    "cuda, compiled": ("cuda", True),
}
"""The columns of the table of ops: device, and whether inside ``torch.compile``."""


def report() -> dict[str, Any]:
    """Gather everything that :func:`main` prints, as plain values."""
    return {
        "machine": _machine(),
        "versions": _versions(),
        "build": _build(),
        "libraries": {_libraries.FILES[device]: _library_state(device) for device in _library.DEVICES},
        "ops": {
            op: {where: _serving(op, *WHERE[where]) for where in WHERE}
            for op in _library._kernels
            if not op.endswith("_backward")  # serves where its op does
        },
    }


def _machine() -> dict[str, str]:
    machine = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": runtime.cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads)",
    }
    if not torch.cuda.is_available():
        machine["GPU"] = "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        machine[f"GPU {index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    return machine


def _versions() -> dict[str, str]:
    versions = {"ctm_fast": ctm_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["torch's CUDA"] = torch.version.cuda or "none"
    for package in ("triton", "numpy", "pillow", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _build() -> dict[str, str]:
    """``build_info()`` of the compiled module, in words."""
    if not HAS_BUILD_INFO:
        return {"ctm_fast._C": "not built for this Python"}
    info = _C.build_info()
    return {
        "compiler": f"{info['compiler']}, {info['flags']}",
        "against torch": info["torch"],
        "nvcc": info["cuda"] or "not used",
        "architectures": " ".join(info["architectures"]) or "none",
    }


def _library_state(device: str) -> str:
    reason = _libraries.missing(device)
    return "loaded" if reason is None else f"not loaded: {reason}"


def _serving(op: str, device: str, compiling: bool) -> dict[str, Any]:
    """The kernel that serves, and why not each of the fused ones that do not."""
    serves = ops.serving(op, device, compiling=compiling)
    why_not: dict[str, str] = {}
    for backend in _library._cells[op]:
        if backend in ("reference", serves):  # the reference is what is left when no other serves
            continue
        reason = _library.unavailable(backend, device)
        if reason is None and _library._forced is not None:
            reason = f"{serves} is forced"
        elif reason is None and backend not in _library.SERVES[device, compiling].get(op, ()):
            reason = "not the default, see SERVES in ctm_fast/ops/_library.py"
        why_not[backend] = reason or f"{serves} comes first"
    return {"kernel": serves, "why_not": why_not}


def _text(values: dict[str, Any]) -> str:
    lines = []
    for title in ("machine", "versions", "build", "libraries"):
        lines += [title, *_columns(list(values[title].items())), ""]
    served = [(op, *(row[where]["kernel"] for where in WHERE)) for op, row in values["ops"].items()]
    lines += ["which kernel serves", *_columns([("op", *WHERE), *served]), "", "and why not another"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for where in WHERE:
        for op, row in values["ops"].items():
            for backend, reason in row[where]["why_not"].items():
                reasons.setdefault((f"{backend} on {where}", reason), []).append(op)
    every = list(values["ops"])
    explained = [
        (what, reason if names == every else f"{reason}: {', '.join(names)}")
        for (what, reason), names in reasons.items()
    ]
    return "\n".join(lines + _columns(explained))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines, indented, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ctm_fast.report", description="What runs here, and why.")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    values = report()
    print(json.dumps(values, indent=2) if parser.parse_args().json else _text(values))


if __name__ == "__main__":
    main()
