"""AOTInductor: a module with our ops, compiled into a package that a C++ program without Python runs."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctm_fast import _libraries
from ctm_fast.ops import precond_combine, precond_input
from ctm_fast.ops._library import Backend, unavailable, use_backend

pytestmark = pytest.mark.long


class Jump(nn.Module):
    """The smallest network between the ops: one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return precond_combine(x, self.conv(precond_input(x, t)), t, s)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled ``tests/aoti``."""
    library = _libraries.DIRECTORY / "libctm_fast_ops.so"
    if reason := unavailable("cpp", "cpu"):
        pytest.skip(reason)
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on the path")
    build = tmp_path_factory.mktemp("aoti")
    configure = ["cmake", "-S", str(Path(__file__).parent / "aoti"), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DCTM_FAST_OPS={library}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    return build / "aoti"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_package_run_from_cpp_equals_eager(program: Path, tmp_path: Path, backend: Backend) -> None:
    torch.manual_seed(0)
    module = Jump().eval().requires_grad_(False)
    x = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    t, s = torch.tensor([0.5, 40.0]), torch.tensor([0.002, 40.0])
    with use_backend(backend):
        exported = torch.export.export(module, (x, t, s))
        calls = {str(node.target) for node in exported.graph.nodes if "ctm_fast" in str(node.target)}
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "jump.pt2"))
        eager = module(x, t, s)
    names = {"ctm_fast.precond_input.default", "ctm_fast.precond_combine.default"}
    assert calls == (names if backend == "cpp" else set())
    subprocess.run([str(program), package, str(tmp_path / "G_x")], check=True)
    found = torch.from_numpy(np.fromfile(tmp_path / "G_x", np.float32)).view_as(eager)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], x[1])  # s = t
