"""The house keeps its shape: imports go down, every op is a full row, and every kernel of an op has one schema."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import ctm_fast.ops
from ctm_fast.ops import _library

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ctm_fast"

FLOORS = (
    {"ops"},
    {"nn"},
    {"models"},
    {"diffusion", "data"},
    {"analytic"},
    {"losses", "samplers", "evaluation"},
    {"training", "serving"},
    {"experiments"},
)
"""Folders of the package from the ground up; those on one floor are blind to each other. The modules beside them
(train.py, sample.py, ...) stand on top, except the cellar."""
CELLAR = {"__init__", "__version__", "_libraries", "distributed", "errors", "files", "markdown", "pictures", "runtime"}
IMPORTS_BY_NAME = {
    "ctm_fast.ops._library",
    "ctm_fast.data.sources",
    "ctm_fast.training.log",
    "ctm_fast.training.placement",
    "ctm_fast.training.states",
    "ctm_fast.training.work",
}
"""May import a module by its name at run time: the kernels of a row, or one whose package is an extra or slow."""

CELLS = (
    "ctm_fast/ops/{}.py",
    "ctm_fast/ops/reference/{}.py",
    "ctm_fast/ops/triton/{}.py",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "tests/ops/test_{}.py",
)
VOID = {
    "ctm_fast/ops/triton/conv3x3.py": "cuDNN serves on a GPU",
    "csrc/cuda/conv3x3.cu": "cuDNN serves on a GPU",
    "csrc/cpu/attention.cpp": "PyTorch's own fused kernel serves on a CPU",
    "csrc/cuda/attention.cu": "Triton's kernel beside PyTorch's own three",
}
"""Cell -> why it is empty."""


def floor(module: str) -> int:
    """Height of ``ctm_fast.<...>``; the cellar is -1."""
    parts = module.split(".")
    top = parts[1] if len(parts) > 1 else "__init__"
    if top in CELLAR:
        return -1
    return next((height for height, folders in enumerate(FLOORS) if top in folders), len(FLOORS))


def faults(module: str, source: str) -> list[str]:
    """What ``module``'s imports do wrong, one line each."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            imported = [f"ctm_fast.{alias.name}" for alias in node.names] if base == "ctm_fast" else [base]
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in {"import_module", "__import__"} and module not in IMPORTS_BY_NAME:
                found.append(f"{module}: {name} hides what is imported")
        for other in imported:
            if id(node) in inside:
                found.append(f"{module}: imports {other} inside a function")
            if other.startswith("."):
                found.append(f"{module}: relative import of {other}")
            if other.split(".")[0] == "ctm_fast" and not below(other, module):
                found.append(f"{module}: imports {other}, which is not below it")
    return found


def below(other: str, module: str) -> bool:
    """Whether ``module`` may import ``other``: from a lower floor, or from its own folder."""
    here, there = floor(module), floor(other)
    own_folder = module.split(".")[1:2] == other.split(".")[1:2] or here in (-1, len(FLOORS))
    return there < here or (there == here and own_folder)


def test_imports_go_down() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found += faults(module, path.read_text())
    assert not found, "\n".join(found)


def test_every_folder_has_a_floor() -> None:
    known = set().union(*FLOORS)
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders <= known, f"give a floor to {sorted(folders - known)}"


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("ctm_fast.ops.gamma_step", "from ctm_fast.nn.block import Block", "not below"),
        ("ctm_fast.ops.gamma_step", "from ctm_fast import nn", "not below"),
        ("ctm_fast.nn.block", "import ctm_fast.training.loop", "not below"),
        ("ctm_fast.losses.ctm", "from ctm_fast.samplers import heun", "not below"),
        ("ctm_fast.diffusion.ode", "from ctm_fast.analytic import gaussian", "not below"),
        ("ctm_fast.serving.sampler", "from ctm_fast.training.state import load", "not below"),
        ("ctm_fast.training.loop", "from ctm_fast.train import main", "not below"),
        ("ctm_fast.errors", "from ctm_fast.ops import noise_embed", "not below"),
        ("ctm_fast.nn.block", "from .linear import Linear", "relative"),
        ("ctm_fast.nn.block", "def f():\n    import torch", "inside a function"),
        ("ctm_fast.nn.block", "import importlib\nimportlib.import_module('ctm_fast.train')", "hides"),
        ("ctm_fast.nn.block", "from ctm_fast.nn.linear import Linear\nfrom ctm_fast import ops, errors", None),
        ("ctm_fast.training.loop", "from ctm_fast.losses import ctm\nfrom ctm_fast.training.state import load", None),
        ("ctm_fast.train", "from ctm_fast.training import loop\nfrom ctm_fast.report import machine", None),
    ],
)
def test_the_test(module: str, source: str, fault: str | None) -> None:
    found = faults(module, source)
    assert len(found) == 1 and fault in found[0] if fault else not found


def rows() -> list[str]:
    """Every stem of which there is a cell, in whatever language."""
    stems = set()
    for cell in CELLS:
        stems |= {path.stem.removeprefix("test_") for path in ROOT.glob(cell.format("*"))}
    return sorted(stem for stem in stems if not stem.startswith("_"))


@pytest.mark.parametrize("row", rows())
def test_row_is_full(row: str) -> None:
    missing = [cell.format(row) for cell in CELLS if not (ROOT / cell.format(row)).exists()]
    assert not [cell for cell in missing if cell not in VOID]
    assert row in ctm_fast.ops.__all__, f"{row} is not exported by ctm_fast.ops"


def test_void_is_void() -> None:
    assert not [cell for cell in VOID if (ROOT / cell).exists()]


def test_cuda_kernels_are_launched_by_launch_alone() -> None:
    """Else no host compiler builds them, and the lane that runs them on a CPU loses the row."""
    sources = sorted((ROOT / "csrc" / "cuda").iterdir())
    assert sources
    assert not [source.name for source in sources if "<<<" in source.read_text()]


def schemas() -> dict[str, str]:
    """Name of an op -> its schema, as csrc/schema.cpp declares it."""
    declared = re.findall(r"m\.def\((.*?)\);", (ROOT / "csrc" / "schema.cpp").read_text(), re.DOTALL)
    texts = ["".join(re.findall(r'"(.*?)"', text)) for text in declared]
    return {text.partition("(")[0]: text for text in texts}


def test_every_op_is_declared() -> None:
    """What Python registers is what C++ declares; nothing is declared that nothing serves."""
    assert set(schemas()) == {name for name, cells in _library._cells.items() if "cpp" in cells}


def normal(schema: str) -> str:
    """A schema as PyTorch prints it, sizes as plain integers: Python annotates SymInt where C++ takes int."""
    return str(torch._C.parse_schema(schema)).replace("SymInt", "int")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the Triton kernels need the triton package")
@pytest.mark.parametrize("name", sorted(_library._kernels))
def test_one_schema(name: str) -> None:
    """The Triton function, the C++ declaration and, where it is loaded, the C++ library agree."""
    modules = next(modules for modules in map(_python, rows()) if all(hasattr(module, name) for module in modules))
    inferred = {normal(name + torch.library.infer_schema(getattr(module, name), mutates_args=())) for module in modules}
    declared = normal(schemas()[name]) if name in schemas() else min(inferred)
    assert inferred == {declared}
    cpp = "cpp" in _library._cells[name]
    if cpp and any(_library.unavailable("cpp", device) is None for device in _library.DEVICES):
        assert normal(str(getattr(torch.ops.ctm_fast, name).default._schema).removeprefix("ctm_fast::")) == declared


def _python(row: str) -> list[object]:
    """The modules of a row's kernels."""
    cells = (f"ctm_fast/ops/{folder}/{row}.py" for folder in ("reference", "triton"))
    paths = (Path(cell).with_suffix("") for cell in cells if cell not in VOID)
    return [importlib.import_module(".".join(path.parts)) for path in paths]
