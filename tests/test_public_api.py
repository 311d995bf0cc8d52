"""What an import does and does not do, and that what is public is there and documented."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import ctm_fast

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ctm_fast.__path__, "ctm_fast.")
    # Triton may not be there; and what an op's kernels do is told once, at its public function.
    if not module.name.startswith(("ctm_fast.ops.triton", "ctm_fast.ops.reference"))
)
PACKAGES = [
    "ctm_fast.analytic",
    "ctm_fast.data",
    "ctm_fast.diffusion",
    "ctm_fast.evaluation",
    "ctm_fast.losses",
    "ctm_fast.models",
    "ctm_fast.models.published",
    "ctm_fast.nn",
    "ctm_fast.ops",
    "ctm_fast.samplers",
    "ctm_fast.serving",
    "ctm_fast.training",
]

_LOOK = """
import json, socket, sys, threading, time

def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"):
        raise SystemExit(f"an import did {event} {arguments}")

import torch
sys.addaudithook(no_network)
before = set(sys.modules)
start = time.perf_counter()
import ctm_fast
from ctm_fast import ops, samplers, serving
from ctm_fast.sample import load
own = time.perf_counter() - start
import ctm_fast.train
print(json.dumps({
    "own": own,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "threads": [thread.name for thread in threading.enumerate()],
    "tasks": len(__import__("os").listdir("/proc/self/task")),
    "load": f"{load.__module__}.{load.__qualname__}",
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """What a fresh interpreter saw while it imported the package."""
    process = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    seen: dict[str, object] = json.loads(process.stdout)
    return seen


def test_import_starts_nothing(imported: dict[str, object]) -> None:
    assert imported["cuda"] is False
    assert imported["threads"] == ["MainThread"]
    assert imported["tasks"] == 1


@pytest.mark.parametrize("package", ["triton", "torch._inductor", "torch._dynamo", "matplotlib", "sklearn", "scipy"])
def test_import_leaves_alone(imported: dict[str, object], package: str) -> None:
    modules = imported["modules"]
    assert isinstance(modules, list)
    assert not [name for name in modules if name == package or name.startswith(f"{package}.")]


def test_import_is_quick(imported: dict[str, object]) -> None:
    """0.2 s beside torch's own on an idle core; the bound leaves room for a busy one."""
    own = imported["own"]
    assert isinstance(own, float)
    assert own < 5


def test_kernels_need_torch_alone() -> None:
    """Ops, layers, schedules and the report import where no other package is, as on a borrowed GPU."""
    others = ("PIL", "hypothesis", "matplotlib", "pytest", "safetensors", "scipy", "sklearn", "tqdm", "triton")
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import ctm_fast.report; "
    code += "from ctm_fast import diffusion, nn, ops"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_load(imported: dict[str, object]) -> None:
    assert imported["load"] == "ctm_fast.serving.sampler.load"


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_there(name: str) -> None:
    package = importlib.import_module(name)
    names = getattr(package, "__all__", [])
    assert sorted(set(names)) == sorted(names)
    assert [entry for entry in names if not hasattr(package, entry)] == []


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name: str) -> None:
    """Modules, functions, classes, and their methods; but for ``main`` and the ``forward`` that a class describes."""
    module = importlib.import_module(name)
    assert module.__doc__, name
    assert _undocumented(module) == []


def _undocumented(module: ModuleType) -> list[str]:
    missing = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__ or name == "main":
            continue
        if inspect.isfunction(value) and not value.__doc__:
            missing.append(name)
        if inspect.isclass(value):
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):  # what dataclass writes where there is none
                missing.append(name)
            missing += [
                f"{name}.{method}"
                for method, function in vars(value).items()
                if inspect.isfunction(inspect.unwrap(getattr(function, "fget", None) or function))
                and not method.startswith("_")
                and method != "forward"
                and not inspect.getdoc(getattr(value, method))
            ]
    return missing
