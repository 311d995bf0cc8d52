"""Build ``ctm_fast/lib`` (kernels) and ``ctm_fast._C`` (how they were built) against the torch that is installed.

The torch is the one of the environment that is being installed into, found by its files: nothing is imported, so that
it is found under pip's build isolation too, and no other torch is ever downloaded. What is built follows from

    CTM_FAST_TORCH       torch's package directory, if it is not in this environment
    CTM_FAST_BUILD       "required": fail where there is no C++ compiler, instead of installing without libraries
    CTM_FAST_CUDA        "1": build the CUDA kernels, also beside a CPU torch; "0": do not; unset: if nvcc fits torch
    CTM_FAST_CUDA_ARCHS  what to build them for, as in CMAKE_CUDA_ARCHITECTURES; unset: the GPUs that are present
    CXX, CUDACXX         the compilers

and is written to ``ctm_fast/lib/build.json``, with the reason for whatever is missing.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
INSTALL_TORCH = "pip install torch==2.13.0"
FORCED_ARCHITECTURES = "80;90a"


def fail(message: str) -> SystemExit:
    return SystemExit(f"ctm_fast: {message}")


class Torch(NamedTuple):
    directory: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """The torch to build against. Exits with one line that says what to run where there is none, or too old a one."""
    if "CTM_FAST_TORCH" in os.environ:
        places = [Path(os.environ["CTM_FAST_TORCH"]).absolute()]
    else:
        site = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
        places = [Path(place) / "torch" for place in site]
    directory = next((place for place in places if (place / "version.py").exists()), None)
    if directory is None:
        raise fail(f"builds against the torch that is installed, and there is none in {places[0]}: run `{INSTALL_TORCH}`")
    text = (directory / "version.py").read_text()
    version = _assigned(text, "__version__") or "unknown"
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise fail(f"needs torch {oldest} or later, and {directory} is {version}: run `{INSTALL_TORCH}`")
    return Torch(directory, version, _assigned(text, "cuda"))


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\b[^=\n]*= *'([^']*)'", text, re.MULTILINE)
    return match and match[1]


def missing_tool() -> str | None:
    """Why no C++ can be compiled here; None where it can."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return f"no C++ compiler (looked for {', '.join(compilers)})"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"no {tool}"
    return None


def find_tool(name: str) -> str | None:
    """cmake or ninja: the one that pip brought as a package (its command is not always on the path), or the system's."""
    package = importlib.util.find_spec(name)
    if package is not None and package.origin is not None:
        scripts = [Path(sys.executable).parent, Path(package.origin).parents[1] / "bin", Path(package.origin).parents[4] / "bin"]
        found = shutil.which(name, path=os.pathsep.join(map(str, scripts)))
        if found:
            return found
    return shutil.which(name)


class Cuda(NamedTuple):
    nvcc: str
    architectures: str


def find_cuda(torch: Torch) -> Cuda | str:
    """The compiler and the architectures for the CUDA kernels, or why they are not built."""
    switch = os.environ.get("CTM_FAST_CUDA", "")
    if switch not in ("", "0", "1"):
        raise fail(f"CTM_FAST_CUDA: expected 0 or 1, got {switch!r}")
    if switch == "0":
        return "switched off by CTM_FAST_CUDA=0"
    forced = switch == "1"
    cuda = _match_nvcc(torch, forced)
    if isinstance(cuda, str) and forced:
        raise fail(f"CTM_FAST_CUDA=1, but {cuda}")
    return cuda


def _match_nvcc(torch: Torch, forced: bool) -> Cuda | str:
    if torch.cuda is None and not forced:
        return f"torch {torch.version} is built without CUDA"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None or shutil.which(nvcc) is None:
        return f"no nvcc (looked for {nvcc or f'nvcc on the path and in {home}/bin'})"
    release = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None:
        return f"{nvcc} --version does not tell a release"
    if torch.cuda is not None and torch.cuda.split(".")[0] != release[1]:
        return f"nvcc is of CUDA {release[1]}.{release[2]} and torch {torch.version} of CUDA {torch.cuda}"
    architectures = os.environ.get("CTM_FAST_CUDA_ARCHS") or _present_gpus() or (FORCED_ARCHITECTURES if forced else "")
    if not architectures:
        return "no GPU is present and CTM_FAST_CUDA_ARCHS names no architecture"
    return Cuda(nvcc, architectures)


def _present_gpus() -> str:
    """The architectures of the GPUs here, as "80;90a"; empty without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capabilities = re.findall(r"^(\d+)\.(\d+)$", subprocess.run(query, capture_output=True, text=True).stdout, re.MULTILINE)
    names = {"".join(capability) for capability in capabilities}
    return ";".join(sorted("90a" if name == "90" else name for name in names))


class BuildLibraries(build_ext):
    """Run CMake and Ninja in ``build/cmake``, then move what they made into the package, each file in one step."""

    def run(self) -> None:
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "ctm_fast"
        libraries = package / "lib"
        libraries.mkdir(parents=True, exist_ok=True)
        reason = missing_tool()
        if reason is None:
            cuda = find_cuda(TORCH)
            built = self._compile(cuda)
            missing = {"cuda": cuda} if isinstance(cuda, str) else {}
        else:
            if os.environ.get("CTM_FAST_BUILD") == "required":
                raise fail(f"CTM_FAST_BUILD=required, but {reason}")
            self.warn(f"{reason}: installing without libraries, PyTorch serves every op. See python -m ctm_fast.report")
            cuda, built, missing = reason, [], {"cpu": reason, "cuda": reason}

        for stale in {*libraries.glob("*.so"), *package.glob("_C.*")} - {package / path for path, _ in built}:
            stale.unlink()
        for path, file in built:
            _replace(package / path, file.read_bytes())
        note = {
            "torch": TORCH.version,
            "built": sorted(path.name for path, _ in built),
            "architectures": [] if isinstance(cuda, str) else cuda.architectures.split(";"),
            "missing": missing,
        }
        _replace(libraries / "build.json", (json.dumps(note, indent=2) + "\n").encode())

    def _compile(self, cuda: Cuda | str) -> list[tuple[Path, Path]]:
        """Build; return for each file its path in the package and where it is now."""
        import pybind11

        build = ROOT / "build" / "cmake"
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        shutil.rmtree(build / "ctm_fast", ignore_errors=True)
        configure = [
            cmake,
            "--fresh",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCTM_FAST_TORCH={TORCH.directory}",
            f"-DCTM_FAST_TORCH_VERSION={TORCH.version}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if isinstance(cuda, Cuda):
            configure += [
                "-DCTM_FAST_WITH_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda.architectures}",
            ]
        for command in (configure, [cmake, "--build", str(build)]):
            if subprocess.run(command).returncode != 0:
                raise fail(f"the build failed, see above: {' '.join(command[:2])} ...")
        made = build / "ctm_fast"
        return [(file.relative_to(made), file) for file in sorted(made.rglob("*.so"))]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "ctm_fast").rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _replace(path: Path, content: bytes) -> None:
    """Write ``path`` in one step: a process that has the old file open keeps it whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.chmod(0o755 if path.suffix == ".so" else 0o644)
    os.replace(partial, path)


TORCH = find_torch()

setup(ext_modules=[Extension("ctm_fast._C", sources=[])], cmdclass={"build_ext": BuildLibraries})
