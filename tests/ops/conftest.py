"""What every op test runs under: each kernel that is there, on each device that is there, in poisoned memory."""

import os
from collections.abc import Iterator, Sequence

import pytest
import torch

from ctm_fast.ops import _library
from ctm_fast.ops._library import Backend, unavailable, use_backend
from tests.cuda_on_cpu import build
from tests.ops.harness import Serving

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

CUDA_ON_CPU = os.environ.get("CUDA_ON_CPU") == "1"
"""A lane of its own: the CUDA kernels, compiled for the CPU (tests/cuda_on_cpu), in place of the C++ ones."""


def _params(*backends: Backend, devices: Sequence[str] = DEVICES) -> list[object]:
    if CUDA_ON_CPU and "cpp" in backends and "cuda" in devices:
        why = build.missing() or unavailable("cpp", "cpu")
        marks = [pytest.mark.skip(reason=f"no CUDA kernels on the CPU: {why}")] if why else []
        return [pytest.param(Serving("cpp", torch.device("cpu"), cuda_on_cpu=True), id="cuda-on-cpu", marks=marks)]
    if CUDA_ON_CPU:
        return [pytest.param(None, marks=pytest.mark.skip(reason="there is no CUDA kernel by design"), id="none")]
    found: list[object] = [
        pytest.param(Serving(backend, torch.device(device)), id=f"{backend}-{device}")
        for device in DEVICES
        if device in devices
        for backend in backends
        if unavailable(backend, device) is None
    ]
    why = "; ".join(f"no {backend}: {unavailable(backend, 'cpu')}" for backend in backends)
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=why), id="none")]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms also fill uninitialised memory with NaN: an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``serving`` and ``fused``: the kernels that the op of the class has by design; without an op, the usual three."""
    op = getattr(metafunc.cls, "op", None)
    cells = _library._cells[op.__name__] if op else ("reference", "cpp", "triton")
    devices = getattr(metafunc.cls, "devices", ("cpu", "cuda"))
    kernels = {
        "serving": cells,
        "fused": [cell for cell in cells if cell in ("cpp", "triton")],
        "native": ["cpp"],
        "tiled": ["triton"],
    }
    for fixture, backends in kernels.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, _params(*backends, devices=devices), indirect=True)


@pytest.fixture(autouse=True)
def _cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that lane: the CUDA kernels serve, and every tensor of the test lies between canaries, which it leaves be."""
    if not CUDA_ON_CPU or build.missing():
        yield
        return
    library = build.load()
    for name, kernel in library.kernels.items():
        monkeypatch.setitem(_library._kernels[name], "cpp", kernel)
    library.install_canaries()
    yield
    library.remove_canaries()
    violations = library.count_violations()
    assert violations == 0, f"wrote past an end of a tensor {violations} times"


@pytest.fixture
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Each kernel that is there, the reference among them, serving while the test runs."""
    with use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def fused(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Each fused kernel that is there, serving while the test runs."""
    with use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """The C++ or CUDA kernels serving, for what only they have."""
    with use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def tiled(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Triton's kernels serving, for what only they have."""
    with use_backend(request.param.backend):
        yield request.param
