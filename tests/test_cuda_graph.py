"""CUDA graphs: the ops can be captured, which a synchronisation would forbid, and replayed on new values."""

import pytest
import torch

from ctm_fast.ops import gamma_step, noise_embed, noise_frequencies, precond_combine, precond_input
from ctm_fast.ops._library import BACKENDS, Backend, unavailable, use_backend
from tests.ops.harness import levels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_capture(backend: Backend, generator: torch.Generator) -> None:
    if reason := unavailable(backend, "cuda"):
        pytest.skip(reason)
    x, F_x = torch.randn(2, 4, 3, 32, 32, generator=generator).cuda()
    t, s = (level.cuda() for level in levels(4, generator))
    seeds, freqs = torch.arange(4).cuda(), noise_frequencies(32, endpoint=True).cuda()

    def call() -> torch.Tensor:
        G_x = precond_combine(precond_input(x, t), F_x, t, s)
        return gamma_step(G_x, F_x, t, s, t, seeds, 1) + noise_embed(t, freqs=freqs).sum()

    with use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles Triton's kernels, before the capture
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = call()
        x.mul_(2)
        graph.replay()
        assert torch.equal(captured, call())
