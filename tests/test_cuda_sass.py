"""The CUDA kernels as nvcc compiles them: no spill, no local memory, registers as planned, 128-bit accesses."""

import shutil
from pathlib import Path

import pytest

from tests.cuda_sass import PLANS, architectures, compile_kernels, find_nvcc

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_every_kernel_is_compiled_as_planned(tmp_path: Path) -> None:
    kernels = compile_kernels(ROOT, tmp_path, architectures(find_nvcc()))
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    assert not faults, "\n".join(faults)
    assert {kernel.name for kernel in kernels} == set(PLANS)


PLANTED = {
    "precond_input": (
        "precond_input.cu",
        "const auto values = Vector<In, N>::load(x + offset);",
        "Vector<In, N> values; for (int i = 0; i < N; ++i) values.values[i] = x[offset + i];",
        "narrow loads beside 0 of 128",
    ),
    "precond_combine": (
        "precond_combine.cu",
        "weights.x * x_values.values[i]",
        "sinf(weights.x * x_values.values[i])",
        "bytes of stack",
    ),
    "group_norm_silu": (
        "group_norm_affine.cuh",
        "__launch_bounds__(kThreads, 2)",
        "__launch_bounds__(kThreads, 6)",
        "bytes of stack",
    ),
    "noise_embed": (
        "noise_embed.cu",
        "sines.store(sin_first ? first : first + half);",
        "for (int i = 0; i < N; ++i) (sin_first ? first : first + half)[i] = sines.values[i];",
        "narrow stores beside 1 of 128",
    ),
}
"""Row -> what of which of its sources becomes what, and the fault that is then found."""


@pytest.mark.long
def test_planted_faults_are_found(tmp_path: Path) -> None:
    """A scalar load, a function with a table on the stack, too few registers, a store element by element."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    for source in tree.glob("csrc/cuda/*.cu"):
        if source.stem not in PLANTED:
            source.unlink()
    for name, was, is_, _ in PLANTED.values():
        source = tree / "csrc" / "cuda" / name
        text = source.read_text()
        assert was in text
        source.write_text(text.replace(was, is_))
    kernels = compile_kernels(tree, tmp_path / "build", ["90a"])
    for row, (*_, says) in PLANTED.items():
        faults = [fault for kernel in kernels if kernel.name.startswith(f"{row} ") for fault in kernel.faults()]
        assert any(says in fault for fault in faults), (row, faults)
        print(faults[0])
