"""What every op test runs under: each kernel that is there, on each device that is there, in poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from ctm_fast.ops._library import Backend, unavailable, use_backend
from tests.ops.harness import Serving

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _params(*backends: Backend) -> list[object]:
    found: list[object] = [
        pytest.param(Serving(backend, torch.device(device)), id=f"{backend}-{device}")
        for device in DEVICES
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


@pytest.fixture(params=_params("reference", "cpp", "triton"))
def serving(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Each kernel that is there, the reference among them, serving while the test runs."""
    with use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=_params("cpp", "triton"))
def fused(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """Each fused kernel that is there, serving while the test runs."""
    with use_backend(request.param.backend):
        yield request.param
