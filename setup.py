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
    """Find the torch to build against; exit with one line that says what to run if there is none, or too old a one."""
    named = os.environ.get("CTM_FAST_TORCH")
    site = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    places = [Path(named).absolute()] if named else [Path(place, "torch") for place in site]
    directory = next((place for place in places if (place / "version.py").exists()), None)
    if directory is None and named:
        raise fail(f"CTM_FAST_TORCH: expected torch's package directory, with version.py in it, got {named}")
    if directory is None:
        raise fail(f"builds against the installed torch, and there is none in {site[0]}: first run `{INSTALL_TORCH}`")
    text = (directory / "version.py").read_text()
    version = _assigned(text, "__version__") or "of unknown version"
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise fail(f"needs torch {oldest} or later, and {directory} is {version}: first run `{INSTALL_TORCH}`")
    return Torch(directory, version, _assigned(text, "cuda"))


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\b[^=\n]*= *'([^']*)'", text, re.MULTILINE)
    return match and match[1]


def find_tool(name: str) -> str | None:
    """Find cmake or ninja: beside this Python, whose ``bin`` need not be on the path, or on the path."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def missing_tool() -> str | None:
    """Say why no C++ can be compiled here; None where it can."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return f"no C++ compiler (looked for {', '.join(compilers)})"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return next((f"no {tool}" for tool in ("cmake", "ninja") if find_tool(tool) is None), None)


class Cuda(NamedTuple):
    nvcc: Path
    architectures: str


def find_cuda(torch: Torch) -> Cuda | str:
    """Find what compiles the CUDA kernels, and for which architectures, or say why they are not built."""
    switch = os.environ.get("CTM_FAST_CUDA", "")
    if switch not in ("", "0", "1"):
        raise fail(f"CTM_FAST_CUDA: expected 0 or 1, got {switch!r}")
    if switch == "0":
        return "switched off by CTM_FAST_CUDA=0"
    if torch.cuda is None and switch != "1":
        return f"torch {torch.version} is built without CUDA"
    nvcc = _find_nvcc(torch)
    if isinstance(nvcc, str):
        if switch == "1":
            raise fail(f"CTM_FAST_CUDA=1, but {nvcc}")
        return nvcc
    architectures = os.environ.get("CTM_FAST_CUDA_ARCHS") or _present_gpus()
    if not architectures and switch != "1":
        return "no GPU is present and CTM_FAST_CUDA_ARCHS names no architecture"
    return Cuda(nvcc, architectures or FORCED_ARCHITECTURES)


def _find_nvcc(torch: Torch) -> Path | str:
    """Find an nvcc whose CUDA has the major version of torch's, or say why there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = shutil.which(
        os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join([os.environ.get("PATH", ""), str(home)])
    )
    if nvcc is None:
        return f"no nvcc (looked on the path and in {home})"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        return f"{nvcc} --version does not tell its release"
    if torch.cuda is not None and torch.cuda.split(".")[0] != release[1]:
        return f"nvcc is of CUDA {release[1]}.{release[2]} and torch {torch.version} of CUDA {torch.cuda}"
    return Path(nvcc)


def _present_gpus() -> str:
    """Name the architectures of the GPUs here, as "80;90a"; empty without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout
    names = {major + minor for major, minor in re.findall(r"^(\d+)\.(\d+)$", told, re.MULTILINE)}
    return ";".join(sorted("90a" if name == "90" else name for name in names))


class BuildLibraries(build_ext):
    """Run CMake and Ninja in ``build/cmake``, then move what they made into the package, each file in one step."""

    def run(self) -> None:
        package = Path(ROOT if self.inplace or self.editable_mode else self.build_lib, "ctm_fast")
        (package / "lib").mkdir(parents=True, exist_ok=True)
        required = os.environ.get("CTM_FAST_BUILD", "")
        if required not in ("", "required"):
            raise fail(f"CTM_FAST_BUILD: expected required, got {required!r}")
        cuda: Cuda | str
        reason = missing_tool()
        if reason is None:
            cuda = find_cuda(TORCH)
            built = self._compile(cuda)
            missing = {"cuda": cuda} if isinstance(cuda, str) else {}
        elif required:
            raise fail(f"CTM_FAST_BUILD=required, but {reason}")
        else:
            self.warn(f"{reason}: installing without libraries, so that PyTorch serves every op")
            cuda, built, missing = reason, {}, {"cpu": reason, "cuda": reason}

        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        for old in [*package.glob("lib/*.so"), package / f"_C{suffix}"]:
            if old.relative_to(package) not in built:
                old.unlink(missing_ok=True)
        note = {
            "torch": TORCH.version,
            "built": sorted(path.name for path in built),
            "architectures": cuda.architectures.split(";") if isinstance(cuda, Cuda) else [],
            "missing": missing,
        }
        built[Path("lib/build.json")] = (json.dumps(note, indent=2) + "\n").encode()
        for path, content in built.items():
            _replace(package / path, content)

    def _compile(self, cuda: Cuda | str) -> dict[Path, bytes]:
        """Return what was built, by its path in the package. A compiler that is there and fails ends the build."""
        import pybind11

        build = ROOT / "build" / "cmake"
        made = build / "ctm_fast"
        shutil.rmtree(made, ignore_errors=True)
        cmake = str(find_tool("cmake"))
        configure = [
            cmake,
            "--fresh",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
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
        for step, command in (("configure", configure), ("compile", [cmake, "--build", str(build)])):
            if subprocess.run(command).returncode != 0:
                raise fail(f"the C++ there is does not {step}, see above")
        return {file.relative_to(made): file.read_bytes() for file in sorted(made.rglob("*.so"))}

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "ctm_fast").rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _replace(path: Path, content: bytes) -> None:
    """Write ``path`` in one step: a process that has the old file open keeps it whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.chmod(0o755 if path.suffix == ".so" else 0o644)
    partial.replace(path)


TORCH = find_torch()

setup(ext_modules=[Extension("ctm_fast._C", sources=[])], cmdclass={"build_ext": BuildLibraries})
