"""The captured solver is the solver: simulated on a CPU, and on a GPU where there is one."""

import pytest
import torch
from torch import Tensor

from ctm_fast.diffusion.ode import solve_heun
from ctm_fast.models import EDMDenoiser
from ctm_fast.training.captured import CapturedHeun
from tests.models.small import SMALL, random_network
from tests.serving.simulated_graphs import simulate


def ways(device: str) -> tuple[EDMDenoiser, list[tuple[Tensor, list[Tensor], Tensor]]]:
    """A teacher, and calls of different lengths and sizes."""
    teacher = EDMDenoiser(random_network(SMALL["ddpmpp"], s_branch=False)).to(device).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    calls = []
    for batch, k in ((4, 3), (4, 1), (2, 2), (4, 5)):
        x = 5 * torch.randn(batch, 3, 8, 8, generator=generator)
        levels = torch.rand(k + 1, batch, generator=generator).sort(0, descending=True).values * 5 + 0.01
        labels = torch.randint(5, (batch,), generator=generator)
        calls.append((x.to(device), list(levels.to(device)), labels.to(device)))
    return teacher, calls


def check(device: str) -> CapturedHeun:
    teacher, calls = ways(device)
    captured = CapturedHeun(teacher.denoise)
    with torch.no_grad():
        for x, levels, labels in calls:
            before = x.clone()
            found = captured(x, levels, labels)
            expected = solve_heun(lambda x, sigma, labels=labels: teacher.denoise(x, sigma, labels), x, levels)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(x, before)
        first = captured(*calls[0])
        kept = first.clone()
        captured(*calls[3])
        assert torch.equal(first, kept), "a result is not the graph's own memory"
    return captured


def test_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = simulate(monkeypatch)
    check("cpu")
    assert [graph.replays for graph in graphs] == [3 + 1 + 5 + 3 + 5, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; simulated above")
def test_on_cuda() -> None:
    check("cuda")
