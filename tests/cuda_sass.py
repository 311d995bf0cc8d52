"""What nvcc made of csrc/cuda: registers, stack and spills from ptxas, widths of loads and stores from the SASS."""

import collections
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Plan:
    """What a kernel may take: at most ``registers`` a thread; for its vector instantiations, at most ``narrow_loads``
    narrower loads (a level, a statistic) beside each 128-bit load, none if it loads no image, and at most
    ``narrow_stores`` beside each 128-bit store, None if it stores no image."""

    registers: int
    narrow_loads: float | None = None
    narrow_stores: float | None = 0


PLANS = {
    "precond_input scale_kernel": Plan(40, narrow_loads=1),
    "precond_combine forward_kernel": Plan(40, narrow_loads=1),
    "precond_combine backward_kernel": Plan(40, narrow_loads=2),
    "noise_embed embed_kernel": Plan(40, narrow_loads=2),
    "philox_normal normal_kernel": Plan(40),
    "philox_normal words_kernel": Plan(40),
    "gamma_step forward_kernel": Plan(64, narrow_loads=5),  # F_x in 16 bits, four at a time, among them
    "group_norm_silu tile_kernel": Plan(80, narrow_loads=2.5, narrow_stores=1),  # a group's statistics among them
    "group_norm_silu tile_backward_kernel": Plan(128, narrow_loads=4),  # a channel's numbers, once in a block
    "group_norm_silu moments_kernel": Plan(80, narrow_loads=0, narrow_stores=None),
    "group_norm_silu merge_kernel": Plan(64),
    "group_norm_silu forward_kernel": Plan(80, narrow_loads=0.5),
    "group_norm_silu affine_kernel": Plan(64),
    "group_norm_silu sums_kernel": Plan(128, narrow_loads=0.75, narrow_stores=None),
    "group_norm_silu merge_sums_kernel": Plan(64),
    "group_norm_silu backward_kernel": Plan(80, narrow_loads=2.5),
}
"""Every kernel; a new one comes with its plan. A multiprocessor has 65536 registers: at 40 six blocks of 256 threads,
at 64 four, at 80 three, at 128 two. Partial sums of a channel in contiguous images are stores of one number."""


@dataclass
class Kernel:
    """A compiled instantiation."""

    symbol: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    accesses: collections.Counter[str] = field(default_factory=collections.Counter)
    """Instruction and width in bits, "LDG 128", "STL 32" -> how many."""

    @property
    def name(self) -> str:
        """Row and kernel, as ``PLANS`` has them."""
        found = re.search(r"_\d+_([a-z_]+)_cu_\w*?\d([a-z][a-z_]*_kernel)", self.symbol)
        assert found, f"a kernel outside csrc/cuda/<row>.cu: {self.symbol}"
        return f"{found[1]} {found[2]}"

    @property
    def is_vector(self) -> bool:
        """Whether a template argument says so: more than one element at a time, or ``Order::kVectors``."""
        return re.search(r"Li[48]E|OrderE0E", self.symbol) is not None

    def count(self, instruction: str, *, wide: bool) -> int:
        return sum(
            n
            for access, n in self.accesses.items()
            if (access == f"{instruction} 128") == wide and access.startswith(f"{instruction} ")
        )

    def faults(self) -> list[str]:
        """Where it is not as planned, one line each."""
        plan = PLANS.get(self.name)
        if plan is None:
            return [f"{self.name}: no plan for it in tests/cuda_sass.py"]
        found = []
        if self.stack or self.spills or any(access.startswith(("LDL", "STL")) for access in self.accesses):
            found.append(f"{self.stack} bytes of stack, {self.spills} of spills, {dict(self.accesses)}")
        if self.registers > plan.registers:
            found.append(f"{self.registers} registers, planned are {plan.registers}")
        if self.is_vector and self.accesses:
            wide, narrow = (self.count("LDG", wide=wide) for wide in (True, False))
            if plan.narrow_loads is not None and (wide == 0 or narrow > plan.narrow_loads * wide):
                found.append(f"{narrow} narrow loads beside {wide} of 128 bits")
            wide, narrow = (self.count("STG", wide=wide) for wide in (True, False))
            if plan.narrow_stores is not None and (wide == 0 or narrow > plan.narrow_stores * wide):
                found.append(f"{narrow} narrow stores beside {wide} of 128 bits")
        return [f"{self.name} for {self.architecture}: {fault}   {self.symbol}" for fault in found]


def find_nvcc() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the path")
    return nvcc


def architectures(nvcc: str) -> list[str]:
    """Those of A100 and of H100, and that of B200 if nvcc knows it."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return ["80", "90a", *(["100"] if "compute_100" in known else [])]


def find_cuobjdump(nvcc: str) -> str:
    """In CUDA's own directories, or in Triton's."""
    places = [Path(nvcc).resolve().parent, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    if importlib.util.find_spec("triton") is not None:
        places.append(Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))
    if found is None:
        pytest.skip("no cuobjdump, neither in CUDA's directories nor in Triton's: the SASS was not read")
    return found


def compile_kernels(tree: Path, directory: Path, archs: list[str]) -> list[Kernel]:
    """Every kernel of a tree's csrc/cuda as the build compiles it, for each architecture, with its SASS read."""
    nvcc = find_nvcc()
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
    configure = [
        *("cmake", "-S", str(tree), "-B", str(directory), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCTM_FAST_TORCH={TORCH}", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCTM_FAST_WITH_CUDA=ON"),
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(f"{arch}-real" for arch in archs),
        "-DCMAKE_CUDA_FLAGS=-Xptxas -v",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", str(directory), "--target", "ctm_fast_cuda"]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = _read_ptxas(result.stdout)
    assert {kernel.architecture for kernel in kernels.values()} == {f"sm_{arch}" for arch in archs}, result.stdout
    _read_sass(find_cuobjdump(nvcc), directory / "ctm_fast" / "lib" / "libctm_fast_cuda.so", kernels)
    return list(kernels.values())


def _read_ptxas(text: str) -> dict[tuple[str, str], Kernel]:
    """(architecture, symbol) -> kernel; functions that a kernel calls count to it as a fault: there are none."""
    kernels = {}
    for symbol, arch, properties in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n((?:(?!.*Compiling entry).*\n)*)", text
    ):
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", properties)
        (registers,) = re.findall(r"Used (\d+) registers", properties)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*used, strict=True))
        kernels[arch, symbol] = Kernel(symbol, arch, int(registers), stack, stores + loads)
    return kernels


def _read_sass(cuobjdump: str, library: Path, kernels: dict[tuple[str, str], Kernel]) -> None:
    arch = ""
    kernel = None
    process = subprocess.Popen([cuobjdump, "-sass", str(library)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif "Function : " in line:
            kernel = kernels[arch, line.split()[-1]]
        elif (found := re.search(r"\b(LDG|STG|LDL|STL)\.?([\w.]*)", line)) and kernel is not None:
            width = re.search(r"\b[US]?(8|16|64|128|256)\b", found[2].replace(".", " "))
            kernel.accesses[f"{found[1]} {width[1] if width else 32}"] += 1
    assert process.wait() == 0
    assert all(kernel.accesses for kernel in kernels.values())
