"""Programs as AOTInductor packages: compiled code and weights in a zip, run from Python or C++."""

import json
import platform
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ctm_fast import _libraries
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.serving.program import Description

_METADATA = ".wrapper_metadata.json"
_LONGEST = 1 << 20
_VECTORS = ("DEFAULT", "AVX2", "AVX512")


def write_pt2(exported: torch.export.ExportedProgram, description: Description, path: Path) -> None:
    """Compile a graph into ``path``, for this processor: seconds for a small network, minutes for a large one.

    Raises ConfigError where there is no C++ compiler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about torch
        try:
            torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": description.metadata()},
            )
        except RuntimeError as error:
            if "InvalidCxxCompiler" not in repr(error):
                raise
            raise ConfigError(f"format: a pt2 needs a C++ compiler, g++ or what CXX names: {_line(error)}") from error


def open_pt2(path: Path) -> tuple[Description, Callable[..., Tensor]]:
    """What the package says it is, and a function of its inputs.

    The code in it is run, and can do whatever this process can: open only what you trust.

    Raises CheckpointError for a file that is no package of ours, before any of its code is loaded, ConfigError for one
    that needs what is not here.
    """
    try:
        metadata = _metadata(path)
        description = Description.of(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_processor(path, metadata)
    if "cpp" in description.ops.values() and (reason := _libraries.missing(description.device)):
        raise ConfigError(f"{path}: calls ops of {_libraries.FILES[description.device]}: {reason}")
    if description.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{path}: was compiled for a GPU, and torch finds none")
    try:
        package = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not load into torch {torch.__version__}: {_line(error)}") from error

    def run(*inputs: Tensor) -> Tensor:
        return package(*inputs)

    return description, run


def _check_processor(path: Path, metadata: Mapping[str, str]) -> None:
    """ConfigError if the code is another processor's: it would end this process."""
    machine, here = metadata.get("AOTI_MACHINE"), platform.machine()
    if machine != here:
        raise ConfigError(f"{path}: was compiled for {machine}, and this machine is {here}")
    capability = torch.backends.cpu.get_cpu_capability()
    known = _VECTORS[: _VECTORS.index(capability) + 1] if capability in _VECTORS else _VECTORS
    for vectors in _VECTORS:
        if vectors in metadata.get("AOTI_CPU_ISA", "").split() and vectors not in known:
            raise ConfigError(f"{path}: was compiled for {vectors}, and torch finds {capability} here")


def _metadata(path: Path) -> dict[str, str]:
    """What :func:`write_pt2` gave the package, read without torch. CheckpointError, which does not name the file."""
    try:
        with zipfile.ZipFile(path) as package:
            members = [member for member in package.infolist() if member.filename.endswith(_METADATA)]
            small = len(members) == 1 and members[0].file_size <= _LONGEST
            metadata = json.loads(package.read(members[0])) if small else None
    except Exception as error:  # a broken zip fails in many ways
        raise CheckpointError(f"expected a whole .pt2 of ctm_fast.export: {_line(error)}") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("expected a .pt2 of ctm_fast.export, got another zip")
    return metadata


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
