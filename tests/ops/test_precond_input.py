"""precond_input: the noisy image as the network sees it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import precond_input
from tests.ops.harness import Gradients, Images, Inputs, Serving, levels


class TestPrecondInput(Gradients, Images):
    op = staticmethod(precond_input)
    anchor = "x"
    differentiable = ("x",)
    constants = ("t",)

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        t, _ = levels(shape[0], generator)
        x = torch.randn(shape, generator=generator) * t.view(-1, 1, 1, 1)
        return {"x": x.requires_grad_(), "t": t, "sigma_data": 0.7, "dtype": dtype}

    def exact(self, **inputs: Any) -> Tensor:
        x, t, sigma_data = inputs["x"], inputs["t"].view(-1, 1, 1, 1), inputs["sigma_data"]
        return x / (t**2 + sigma_data**2).sqrt()

    def test_unit_variance(self, serving: Serving, generator: torch.Generator) -> None:
        """Data of standard deviation sigma_data, with noise t upon it, come out with variance 1, at the default too."""
        t = torch.tensor([0.002, 0.5, 80.0])
        x = torch.randn(3, 1, 1000, 1000, generator=generator) * (0.25 + t.square()).sqrt().view(-1, 1, 1, 1)
        variance = precond_input(x.to(serving.device), t.to(serving.device)).cpu().double().var(dim=(1, 2, 3))
        torch.testing.assert_close(variance, torch.ones(3).double(), rtol=0, atol=0.01)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_dtype(self, serving: Serving, dtype: torch.dtype) -> None:
        x, t = torch.ones(1, 1, 1, 1, device=serving.device), torch.ones(1, device=serving.device)
        assert precond_input(x, t, dtype=dtype).dtype == dtype
        assert precond_input(x, t).dtype == torch.float32

    def test_dtype_message(self, serving: Serving) -> None:
        with pytest.raises(TypeError, match=r"^dtype: expected .*, got torch.float64$"):
            precond_input(torch.ones(1, 1, 1, 1), torch.ones(1), dtype=torch.float64)
