"""gamma_step: the jump, and the noise after it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import Stream, gamma_step, philox_normal, precond_combine
from tests.ops.harness import Gradients, Images, Inputs, Serving, levels, on, upcast
from tests.ops.philox import BOUND, exact_normal, random_seeds


class TestGammaStep(Gradients, Images):
    op = staticmethod(gamma_step)
    anchor = "x"
    differentiable = ("x", "F_x")
    constants = ("t", "s", "t_next")

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        t, s = levels(shape[0], generator)
        return {
            "x": (torch.randn(shape, generator=generator) * t.view(-1, 1, 1, 1)).requires_grad_(),
            "F_x": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
            "t": t,
            "s": s,
            "t_next": s + t * torch.rand(shape[0], generator=generator),
            "seeds": random_seeds(shape[0], generator),
            "step": 2**31 + 1,
            "sigma_data": 0.7,
        }

    def terms(self, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What x, F_x and the noise contribute."""
        sigma_data = inputs["sigma_data"]
        t, s, t_next = (inputs[name].view(-1, 1, 1, 1) for name in ("t", "s", "t_next"))
        c_skip = sigma_data**2 / (t**2 + sigma_data**2)
        c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
        noise = exact_normal(inputs["seeds"], inputs["step"], tuple(inputs["x"].shape[1:]), Stream.RENOISE)
        from_x = (s / t + (t - s) / t * c_skip) * inputs["x"]
        return from_x, (t - s) / t * c_out * inputs["F_x"], ((t_next - s) * (t_next + s)).sqrt() * noise

    def exact(self, **inputs: Any) -> Tensor:
        from_x, from_F, noise = self.terms(**inputs)
        return from_x + from_F + noise

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> Tensor:
        """That of the jump, and of the noise: absolute times its standard deviation, and what float32 loses."""
        assert dtype == torch.float32
        wide = {name: v.detach() if isinstance(v, Tensor) else v for name, v in upcast(inputs).items()}
        from_x, from_F, noise = self.terms(**wide)
        std = ((wide["t_next"] - wide["s"]) * (wide["t_next"] + wide["s"])).sqrt().view(-1, 1, 1, 1)
        return BOUND * std + serving.tolerance(dtype) * (from_x.abs() + from_F.abs() + noise.abs())

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_noise(
        self, serving: Serving, dtype: torch.dtype, layout: torch.memory_format, generator: torch.Generator
    ) -> None:
        """t_next = s is the jump alone: to the bit on a CPU; on a GPU each kernel contracts a x + b F_x as it likes."""
        inputs = on(self.inputs((5, 3, 9, 11), dtype, generator), serving.device)
        inputs["x"] = inputs["x"].detach().contiguous(memory_format=layout)
        inputs["t_next"] = inputs["s"].clone()
        jump: Inputs = {name: inputs[name] for name in ("x", "F_x", "t", "s", "sigma_data")}
        rounding = 2e-6 if serving.device.type == "cuda" else 0.0
        torch.testing.assert_close(self.op(**inputs), precond_combine(**jump), rtol=rounding, atol=rounding)

    def test_noise_is_philox_normal(self, serving: Serving, generator: torch.Generator) -> None:
        """Nothing but noise: from s = 0 of a black image up to t_next = 1."""
        seeds = random_seeds(4, generator).to(serving.device)
        one = torch.ones(4, device=serving.device)
        black = torch.zeros(4, 3, 6, 10, device=serving.device)
        found = gamma_step(black, black, one, 0 * one, one, seeds, 4)
        expected = philox_normal(seeds, 4, (3, 6, 10), stream=Stream.RENOISE)
        torch.testing.assert_close(found, expected, rtol=0, atol=BOUND)

    def test_any_batch(self, serving: Serving, generator: torch.Generator) -> None:
        """A sample does not depend on the batch it is in: to the bit."""
        inputs = on(self.inputs((9, 3, 5, 7), torch.float32, generator), serving.device)
        whole = self.op(**inputs)
        order = torch.randperm(9, generator=generator).to(serving.device)
        for chosen in (order, order[:1]):
            part: Inputs = {name: v[chosen] if isinstance(v, Tensor) else v for name, v in inputs.items()}
            assert torch.equal(self.op(**part), whole[chosen])

    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 70, 6, 6), (3, 5, 3, 3), (2, 1, 4, 4), (2, 4, 1, 1)], ids=str)
    def test_layouts_agree(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        """The noise follows the logical order: channels_last gives the same image, to the bit."""
        inputs = on(self.inputs(shape, torch.float32, generator), serving.device)
        last = inputs | {
            name: inputs[name].detach().contiguous(memory_format=torch.channels_last) for name in ("x", "F_x")
        }
        assert torch.equal(self.op(**last), self.op(**inputs))

    def test_steps_share_a_graph(self, serving: Serving, generator: torch.Generator) -> None:
        """A sampler's steps: one graph for the first, one with the step as a variable for all that follow."""
        graphs: list[object] = []

        def backend(graph: Any, example: Any) -> Any:
            graphs.append(graph)
            return graph

        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), serving.device)
        torch._dynamo.reset()
        compiled = torch.compile(self.op, backend=backend, fullgraph=True)
        for step in (0, 1, 2, 3, 17, 2**32 - 1):
            assert torch.equal(compiled(**inputs | {"step": step}), self.op(**inputs | {"step": step}))
        assert len(graphs) <= 2

    def test_step_messages(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), serving.device)
        self.check_error(inputs | {"step": -1}, ValueError, "^step: expected 0 to 4294967295, got -1$")
        self.check_error(inputs | {"step": 2.0}, TypeError, "^step: expected an int, got float$")
        self.check_error(
            inputs | {"seeds": inputs["seeds"][:2]}, ValueError, r"^seeds: expected shape \[3\], got \[2\]$"
        )
