"""The lane finds what it is there for: each fault, planted in a copy of the kernels, fails the row's own tests."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_on_cpu import build


@dataclass(frozen=True)
class Fault:
    """``was`` becomes ``is_`` in ``source``; running ``row``'s tests then says one of ``says``."""

    row: str
    source: str
    was: str
    is_: str
    says: tuple[str, ...]


FAULTS = {
    "an unguarded tail": Fault(
        "precond_combine",
        "cuda/precond_combine.cu",
        "if (within >= size)",
        "if (within >= size + 3 * N)",
        ("wrote at byte", "two write to one place"),
    ),
    "a dropped mask": Fault(
        "philox_normal",
        "cuda/noise.cuh",
        "      if (lane < at.count) {\n        image",
        "      {\n        image",
        ("wrote at byte",),
    ),
    "a read past the end": Fault(
        "precond_input", "cuda/precond_input.cu", "load(x + offset)", "load(x + offset + N)", ("is not finite", "bound")
    ),
    "a missing barrier": Fault(
        "group_norm_silu",
        "cuda/group_norm.cuh",
        "      __syncthreads();\n",
        "",
        ("depends on the order in which threads run",),
    ),
    "a barrier that some threads miss": Fault(
        "group_norm_silu",
        "cuda/group_norm_parts.cuh",
        "  float values[3][M] = {};\n  if (share.count > 0) {",
        "  float values[3][M] = {};\n  if (!share.present) {\n    return;\n  }\n  if (share.count > 0) {",
        ("wait at __syncthreads()", "at a warp's exchange"),
    ),
    "too little shared memory": Fault(
        "group_norm_silu",
        "cuda/group_norm.cuh",
        "sizeof(float) * K * kThreads * N",
        "sizeof(float) * K * kThreads / 4",
        ("shared memory",),
    ),
    "a vector that is not aligned": Fault(
        "precond_combine",
        "cuda/launch.cuh",
        "return size % N == 0 &&",
        "return size >= N &&",
        ("not aligned for the access",),
    ),
    "a chunk that is not cut at the image's end": Fault(
        "group_norm_silu",
        "cuda/group_norm.cuh",
        "chunk * plan.chunk + plan.chunk < plan.pixels ? chunk",
        "chunk < plan.pixels ? chunk",
        ("wrote at byte", "is not finite", "bound"),
    ),
    "a missing barrier between two passes over a tile": Fault(
        "group_norm_silu",
        "cuda/group_norm_tile.cuh",
        "  total.keep(sums + threadIdx.x * M);\n  __syncthreads();\n",
        "  total.keep(sums + threadIdx.x * M);\n",
        ("depends on the order in which threads run", "is not finite"),
    ),
    "a tile with a group too many": Fault(
        "group_norm_silu",
        "cuda/group_norm_tile.cuh",
        "channels - first()) / width",
        "channels - first() + width) / width",
        ("wrote at byte", "two write to one place", "is not finite"),
    ),
    "a tile that its shared memory is too small for": Fault(
        "group_norm_silu",
        "cuda/group_norm_tile.cuh",
        "images * 16 * vectors",
        "images * 16 * (vectors - 1)",
        ("shared memory",),
    ),
    "a missing barrier before a tile's gradient": Fault(
        "group_norm_silu",
        "cuda/group_norm_tile_backward.cuh",
        "    return;\n  }\n  __syncthreads();\n",
        "    return;\n  }\n",
        ("depends on the order in which threads run",),
    ),
    "the memory of sums used again too early": Fault(
        "group_norm_silu",
        "cuda/group_norm_tile_backward.cuh",
        "    __syncthreads();  // one after the other in",
        "    // one after the other in",
        ("depends on the order in which threads run",),
    ),
    "a lane left out of an exchange": Fault(
        "group_norm_silu",
        "cuda/group_norm.cuh",
        "kWholeWarp = 0xffffffff",
        "kWholeWarp = 0x7fffffff",
        ("a lane that its mask leaves out",),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    if (why := build.missing()) is not None:
        pytest.skip(why)
    fault = FAULTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    for other in csrc.glob("cuda/*.cu"):
        if other.stem != fault.row:
            other.unlink()
    text = (csrc / fault.source).read_text()
    assert fault.was in text
    (csrc / fault.source).write_text(text.replace(fault.was, fault.is_))
    library = build.compile_library(csrc, tmp_path / "build")
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", f"tests/ops/test_{fault.row}.py"]
    result = subprocess.run(
        [*command, "-k", "cuda-on-cpu and (values or low_precision or widths or gradients)"],
        cwd=build.ROOT,
        env=os.environ | {"CUDA_ON_CPU": "1", "CUDA_ON_CPU_LIBRARY": str(library)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(words in result.stdout for words in fault.says), result.stdout
    errors = [line for line in result.stdout.splitlines() if line.startswith("E  ")]
    print(errors[0], result.stdout.splitlines()[-1], sep="\n")
