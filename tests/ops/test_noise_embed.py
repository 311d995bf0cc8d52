"""noise_embed: positional and Fourier features of one or two noise levels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import noise_embed, noise_frequencies, use_reference
from tests.ops.harness import Inputs, Op, Serving, levels, on, tensors


class TestNoiseEmbed(Op):
    op = staticmethod(noise_embed)
    anchor = "t"

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """A level for each image; the frequencies as many as a row has pixels. s = 0 is never given to a network."""
        t, s = levels(shape[0], generator)
        freqs = torch.randn(math.prod(shape[1:]), generator=generator)
        return {"t": t, "s": s.clamp(min=0.002), "freqs": freqs}

    def exact(self, **inputs: Any) -> tuple[Tensor, ...]:
        scale = {"edm": 1 / 4, "adm": 250}[inputs.get("c_noise", "edm")]
        angles = [
            torch.outer(scale * level.log(), inputs["freqs"])
            for level in (inputs["t"], inputs["s"])
            if level is not None
        ]
        if inputs.get("order", "sin_cos") == "sin_cos":
            return tuple(torch.cat((angle.sin(), angle.cos()), dim=1) for angle in angles)
        return tuple(torch.cat((angle.cos(), angle.sin()), dim=1) for angle in angles)

    def varieties(self, generator: torch.Generator) -> list[Inputs]:
        return [inputs | one for inputs in super().varieties(generator) for one in ({}, {"s": None})]

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> float | Tensor:
        """An ulp of the logarithm, one of each product and one of the sine: the angle's size times 2^-22, and 2^-22."""
        scale = {"edm": 1 / 4, "adm": 250}[inputs.get("c_noise", "edm")]
        largest = scale * math.log(500) * float(inputs["freqs"].abs().amax()) if inputs["freqs"].numel() else 0.0
        return torch.full((), 2.0**-22 * (1 + largest), dtype=torch.float64)

    @pytest.mark.parametrize("order", ["sin_cos", "cos_sin"])
    @pytest.mark.parametrize("c_noise", ["edm", "adm"])
    @pytest.mark.parametrize("pair", [False, True], ids=["t", "t,s"])
    @pytest.mark.parametrize("channels", [2, 4, 128, 192, 1000])
    def test_kinds(
        self, serving: Serving, channels: int, pair: bool, c_noise: str, order: str, generator: torch.Generator
    ) -> None:
        t, s = levels(37, generator)
        freqs = noise_frequencies(channels, endpoint=c_noise == "edm")
        inputs = {"t": t, "s": s.clamp(min=0.002) if pair else None, "freqs": freqs, "c_noise": c_noise, "order": order}
        for features in self.check_values(inputs, serving):
            assert features.shape == (37, channels)
            assert features.is_contiguous()

    def test_fourier(self, serving: Serving, generator: torch.Generator) -> None:
        """Fourier features: 2 pi times normals of scale 16; angles of hundreds."""
        t, s = levels(37, generator)
        freqs = 2 * math.pi * 16 * torch.randn(64, generator=generator)
        self.check_values({"t": t, "s": s.clamp(min=0.002), "freqs": freqs, "order": "cos_sin"}, serving)

    def test_sine_and_cosine(self, serving: Serving) -> None:
        """To an ulp, for small and large angles: the level is e^4, whose c_noise is 1, so that the angles are exact.

        A GPU's logarithm may miss 4 by an ulp, which a large angle shows, and its sine has two ulp.
        """
        gpu = serving.device.type == "cuda"
        freqs = torch.cat((torch.linspace(-100, 100, 20001), torch.tensor([] if gpu else [1e4, 1e5, 1e6])))
        t = torch.tensor([math.exp(4)])
        features = noise_embed(t.to(serving.device), freqs=freqs.to(serving.device)).cpu().double()
        angles = freqs.double()[None]
        assert (features - torch.cat((angles.sin(), angles.cos()), dim=1)).abs().max() < (3e-5 if gpu else 2**-23)

    def test_one_equals_both(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = self.inputs((5, 3, 5, 7), torch.float32, generator)
        t, s, freqs = (inputs[name].to(serving.device) for name in ("t", "s", "freqs"))
        both = noise_embed(t, s, freqs=freqs)
        assert torch.equal(both[0], noise_embed(t, freqs=freqs))
        assert torch.equal(both[1], noise_embed(s, freqs=freqs))

    def test_sigma_one(self, serving: Serving) -> None:
        """ln 1 = 0: sines 0, cosines 1, in the order asked for."""
        t, freqs = torch.ones(2, device=serving.device), torch.arange(3.0, device=serving.device)
        expected = torch.tensor([[0.0, 0, 0, 1, 1, 1]] * 2)
        assert torch.equal(noise_embed(t, freqs=freqs).cpu(), expected)
        assert torch.equal(noise_embed(t, freqs=freqs, order="cos_sin").cpu(), expected.roll(3, dims=1))

    def test_strides(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = on(self.inputs((5, 3, 5, 7), torch.float32, generator), serving.device)
        strided = {name: torch.stack((tensor, -tensor), dim=-1)[..., 0] for name, tensor in tensors(inputs).items()}
        self.check_values(strided, serving)

    def test_no_gradient(self, fused: Serving, generator: torch.Generator) -> None:
        """A level or a frequency that wants a gradient: an error from a kernel, a gradient from the reference."""
        for name in ("t", "s", "freqs"):
            inputs = self.inputs((3, 3, 5, 7), torch.float32, generator)
            inputs = {key: tensor.to(fused.device).requires_grad_(key == name) for key, tensor in inputs.items()}
            self.check_error(inputs, NotImplementedError, "^noise_embed: the .* kernel has no gradient")
            with use_reference():
                first, second = noise_embed(**inputs)
            (first + second).sum().backward()
            assert inputs[name].grad.abs().sum() > 0

    def test_forward_mode(self, fused: Serving, generator: torch.Generator) -> None:
        inputs = self.inputs((3, 3, 5, 7), torch.float32, generator)
        t, freqs = inputs["t"].to(fused.device), inputs["freqs"].to(fused.device)

        def embed(level: Tensor) -> Tensor:
            return noise_embed(level, freqs=freqs)

        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(embed, (t,), (torch.ones_like(t),))
        with use_reference():
            features, tangent = torch.func.jvp(embed, (t,), (torch.ones_like(t),))[:2]
        sine, cosine = features.chunk(2, dim=1)
        factor = freqs / (4 * t[:, None])  # d(c f) / dt
        torch.testing.assert_close(tangent, torch.cat((factor * cosine, -factor * sine), dim=1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"c_noise": "vp"}, r"^c_noise: expected one of edm, adm, got 'vp'$"),
            ({"order": "sin"}, r"^order: expected one of sin_cos, cos_sin, got 'sin'$"),
        ],
    )
    def test_names(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            noise_embed(torch.ones(1), freqs=torch.ones(1), **change)


class TestNoiseFrequencies:
    @pytest.mark.parametrize("endpoint", [True, False])
    @pytest.mark.parametrize("channels", [2, 4, 128, 192])
    def test_formula(self, channels: int, endpoint: bool) -> None:
        half = channels // 2
        steps = (half - 1 or 1) if endpoint else half
        expected = [10000.0 ** (-j / steps) for j in range(half)]
        table = noise_frequencies(channels, endpoint=endpoint)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)

    def test_endpoint(self) -> None:
        assert noise_frequencies(128, endpoint=True, max_period=100)[-1].item() == pytest.approx(0.01)

    @pytest.mark.parametrize("channels", [-2, 0, 7])
    def test_message(self, channels: int) -> None:
        with pytest.raises(ValueError, match=f"^channels: expected an even number from 2 on, got {channels}$"):
            noise_frequencies(channels, endpoint=True)
