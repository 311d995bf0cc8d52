"""What every test runs under: one thread, no TF32, and random numbers that belong to the test."""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it under deterministic algorithms


@pytest.fixture(autouse=True)
def _pinned() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # and not what a command line of an earlier test has set
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator seeded with the test's own id: fresh inputs for each test, the same in each run."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))
