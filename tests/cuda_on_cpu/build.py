"""Compile csrc/cuda/*.cu for the CPU, unchanged, and load them as the ops of a namespace of their own."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctm_fast.ops import _library

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NAMESPACE = "ctm_fast_cuda_on_cpu"
TORCH = Path(torch.__file__).parent

COMMON = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra")
# As the CPU library is built, without fused multiply-adds, so that results do not depend on the compiler's choices.
# The sanitizers call functions of engine.cpp: no library of theirs is needed.
KERNELS = (
    *("-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-unused-function", "-fno-strict-aliasing"),
    "-fsanitize=alignment,bounds",
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-include", str(HERE / "prelude.h")),
)


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if shutil.which("g++") is None:
        return "no g++ on the path"
    if not (TORCH / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        return f"no headers of torch in {TORCH}"
    return None


def compile_library(csrc: Path, directory: Path) -> Path:
    """The library of ``csrc``'s schemas and CUDA kernels, in ``directory``, which keeps what is built already.

    Each object is named by the hash of all that it is made from, so that a change compiles what it touches.
    """
    directory.mkdir(parents=True, exist_ok=True)
    headers = [*csrc.glob("common/*.h"), *csrc.glob("cuda/*.cuh"), *HERE.glob("*.h")]
    shared = hashlib.sha256(repr((COMMON, KERNELS, sys.version, torch.__version__)).encode())
    for header in sorted(headers):
        shared.update(header.read_bytes())
    include = ["-I", str(HERE), "-isystem", str(TORCH / "include")]
    objects = []
    for source in (csrc / "schema.cpp", *sorted(csrc.glob("cuda/*.cu")), HERE / "engine.cpp", HERE / "memory.cpp"):
        digest = shared.copy()
        digest.update(source.read_bytes())
        target = directory / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        flags = KERNELS if source.is_relative_to(csrc) else ()
        if not target.exists():
            _write(target, "-x", "c++", *COMMON, *flags, *include, "-c", str(source))
        objects.append(target)
    name = hashlib.sha256(" ".join(target.name for target in objects).encode()).hexdigest()[:16]
    library = directory / f"lib{NAMESPACE}-{name}.so"
    if not library.exists():
        torch_libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,-z,defs"]
        _write(library, "-shared", *map(str, objects), *torch_libraries)
    return library


def _write(target: Path, *arguments: str) -> None:
    """Run g++; the file appears whole or not at all, whoever else builds it."""
    partial = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run(["g++", *arguments, "-o", str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"g++ {' '.join(arguments)}:\n{result.stderr}")
    partial.replace(target)


class CudaOnCpu:
    """The CUDA kernels of a library as ops on CPU tensors, and the canaries around those."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._memory = ctypes.CDLL(str(library))
        self.kernels: dict[str, Callable[..., Any]] = {
            name: _library.derive(NAMESPACE, name) for name, cells in _library._cells.items() if "cpp" in cells
        }

    def install_canaries(self) -> None:
        self._memory.install_canaries()

    def remove_canaries(self) -> None:
        self._memory.remove_canaries()

    def count_violations(self) -> int:
        """Canaries found overwritten since the last call."""
        return int(self._memory.count_violations())


@functools.cache
def load() -> CudaOnCpu:
    """Of this tree's sources, compiled into build/cuda_on_cpu, or the library that CUDA_ON_CPU_LIBRARY names."""
    named = os.environ.get("CUDA_ON_CPU_LIBRARY")
    return CudaOnCpu(Path(named) if named else compile_library(ROOT / "csrc", ROOT / "build" / "cuda_on_cpu"))
