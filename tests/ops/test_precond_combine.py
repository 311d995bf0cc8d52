"""precond_combine: EDM's denoiser and CTM's jump."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import precond_combine
from tests.ops.harness import Gradients, Images, Inputs, Serving, levels


class TestPrecondCombine(Gradients, Images):
    op = staticmethod(precond_combine)
    anchor = "x"
    differentiable = ("x", "F_x")
    constants = ("t", "s")

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        t, s = levels(shape[0], generator)
        return {
            "x": (torch.randn(shape, generator=generator) * t.view(-1, 1, 1, 1)).requires_grad_(),
            "F_x": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
            "t": t,
            "s": s,
            "sigma_data": 0.7,
        }

    def exact(self, **inputs: Any) -> Tensor:
        x, F_x, sigma_data = inputs["x"], inputs["F_x"], inputs["sigma_data"]
        t, s = inputs["t"].view(-1, 1, 1, 1), inputs["s"].view(-1, 1, 1, 1)
        c_skip = sigma_data**2 / (t**2 + sigma_data**2)
        c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
        g_x = c_skip * x + c_out * F_x
        return (s / t) * x + (t - s) / t * g_x

    def test_no_jump(self, serving: Serving, generator: torch.Generator) -> None:
        """s = t returns x, to the bit, whatever the network says."""
        inputs = self.inputs((4, 3, 8, 8), torch.float32, generator)
        inputs = {name: v.to(serving.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        assert torch.equal(precond_combine(**inputs | {"s": inputs["t"]}), inputs["x"])

    def test_gaussian_denoiser(self, serving: Serving, generator: torch.Generator) -> None:
        """For data N(0, sigma_data^2) a zero network is the exact denoiser: D(x; t) = E[x0 | x] = c_skip(t) x."""
        x = torch.randn(2, 3, 8, 8, generator=generator)
        t = torch.tensor([0.5, 1.0])
        given = [v.to(serving.device) for v in (x, torch.zeros_like(x), t, torch.zeros(2))]
        expected = x * torch.tensor([0.5, 0.2]).view(-1, 1, 1, 1)
        torch.testing.assert_close(precond_combine(*given).cpu(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("gap", [1e-3, 1e-5])
    def test_short_jump(self, serving: Serving, gap: float, generator: torch.Generator) -> None:
        """The factor of F_x, (t - s) / t, keeps its digits where s is close to t: 1 - s / t would not."""
        inputs = self.inputs((5, 3, 8, 8), torch.float32, generator)
        inputs |= {"s": inputs["t"] * (1 - gap), "x": torch.zeros_like(inputs["x"])}
        self.check_values(inputs, serving)

    @pytest.mark.parametrize("wanted", ["x", "F_x"])
    def test_double_backward_of_one_image_through_a_transposed_cotangent(
        self, serving: Serving, wanted: str, generator: torch.Generator
    ) -> None:
        """The gradient a grad or b grad, pulled back by a cotangent that lies in memory another way."""
        inputs = self.inputs((2, 3, 5, 5), torch.float32, generator)
        inputs = {name: v.detach().to(serving.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        inputs[wanted].requires_grad_()
        grad, other = torch.randn(2, 2, 3, 5, 5, generator=generator).to(serving.device)
        grad.requires_grad_()
        (first,) = torch.autograd.grad(self.op(**inputs), inputs[wanted], grad, create_graph=True)
        (second,) = torch.autograd.grad(first, grad, other.transpose(2, 3))
        with torch.no_grad():
            zeros = {"x": torch.zeros_like(other), "F_x": torch.zeros_like(other)}
            expected = self.exact(**{**inputs, **zeros, wanted: other.transpose(2, 3)})
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)
