"""The row group_norm_silu: what the harness asks of every op, and what is particular to statistics of groups."""

import collections
import importlib
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ctm_fast.ops import group_norm_silu
from ctm_fast.ops._library import INTERPRETED
from tests.ops.harness import LOW, Gradients, Images, Inputs, Serving, assert_close, channels_last, on, upcast

GROUP_WIDTHS = (1, 6, 8, 12, 18, 30, 42)
"""Channels of a group: ADM's are 6 to 42, DDPM++'s 4 to 16."""

WAYS = [
    ((2, 48, 8, 8), 8),  # CUDA: one tile to an image, groups of 6 in vectors of 4 and 8
    ((2, 40, 16, 16), 5),  # channels_last tiles of 32 or 16 channels, the last one cut
    ((1, 72, 9, 8), 4),  # rows of threads that leave some idle; pixels no power of two
    ((3, 12, 4, 2), 12),  # groups of one channel, of a vector or two
    ((1, 16, 48, 32), 2),  # more shared memory than a kernel has unasked
    ((1, 48, 32, 32), 1),  # in no dtype does a group fit: by parts
    ((1, 48, 64, 32), 4),  # by parts, but for contiguous images of 16 bits
    ((3, 192, 1, 1), 8),  # one pixel, which is both memory formats; on a CPU in several blocks
    ((2, 384, 4, 1), 2),  # channels_last: two rows of threads, or five
]
"""Shape and groups: both of CUDA's ways in each dtype and memory format, and the edges of its tiles."""


class TestGroupNormSilu(Gradients, Images):
    op = staticmethod(group_norm_silu)
    anchor = "x"
    differentiable = ("x", "weight", "bias", "x_shift", "scale", "shift", "residual")
    constants: ClassVar[tuple[str, ...]] = ()
    twice = False

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """Twelve channels for each one asked for, in two groups: a group of two numbers has no gradient to speak of."""
        batch, width, height, length = shape
        return self.image((batch, 12 * width, height, length), max(1, 2 * width), dtype, generator)

    def image(self, shape: tuple[int, ...], groups: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        batch, channels = shape[:2]

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).requires_grad_()

        return {
            "x": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
            "weight": normal(channels),
            "bias": normal(channels),
            "groups": groups,
            "eps": 1e-5,
            "x_shift": normal(batch, channels),
            "scale": normal(batch, channels),
            "shift": normal(batch, channels),
            "silu": True,
            "residual": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
            "out_scale": 0.5**0.5,
        }

    def exact(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        out_scale: float,
        x_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        batch, channels = x.shape[:2]

        def image(values: Tensor | None) -> Tensor:
            return torch.zeros(1, 1, 1, 1) if values is None else values[:, :, None, None]

        h = x + image(x_shift)
        grouped = h.reshape(batch, groups, channels // groups * x.shape[2] * x.shape[3])
        centred = grouped - grouped.mean(2, keepdim=True)
        n = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
        z = (n * weight.view(1, channels, 1, 1) + bias.view(1, channels, 1, 1)) * (1 + image(scale)) + image(shift)
        y = z / (1 + torch.exp(-z)) if silu else z
        return (y if residual is None else y + residual) * out_scale

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> float:
        # Statistics are sums of as many float32 as a group has; PyTorch folds the mean into an offset, which cancels.
        return serving.tolerance(dtype) + (2e-5 if serving.backend == "reference" else 2e-6)

    def varieties(self, generator: torch.Generator) -> list[Inputs]:
        plain = self.inputs((3, 1, 5, 7), torch.float32, generator)
        bare = plain | dict.fromkeys(("x_shift", "scale", "shift", "residual")) | {"silu": False, "out_scale": 1.0}
        some = plain | dict.fromkeys(("scale", "shift"))
        return [*super().varieties(generator), bare, channels_last(some)]

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("width", GROUP_WIDTHS)
    def test_group_widths(self, serving: Serving, width: int, layout: str, generator: torch.Generator) -> None:
        """Values and gradients for groups that are and are not whole vectors, of odd and even numbers of channels."""
        for groups, size in ((3, (3, 5)), (4, (8, 8)), (1, (1, 1)) if width > 1 else (2, (4, 1))):
            inputs = self.image((2, groups * width, *size), groups, torch.float32, generator)
            if layout == "channels_last":
                inputs = channels_last(inputs)
            self.check_values(inputs, serving)
            actual, exact = on(inputs, serving.device), upcast(inputs)
            out, true = self.op(**actual), self.exact(**exact)
            cotangent = torch.randn(out.shape, generator=generator)
            found = torch.autograd.grad(out, self.sensitive(actual), cotangent.to(out))
            expected = torch.autograd.grad(true, self.sensitive(exact), cotangent.double())
            for one, other in zip(found, expected, strict=True):
                # A shift of a whole group changes nothing: its gradient is what is left of terms as large as that of x.
                largest = max(float(other.abs().max()), float(expected[0].abs().max()))
                few = width * size[0] * size[1] < 16
                assert_close(one, other, torch.full_like(other, (1e-4 if few else 1e-5) * largest))

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(("shape", "groups"), WAYS, ids=str)
    def test_values_either_way(
        self,
        native: Serving,
        shape: tuple[int, ...],
        groups: int,
        layout: str,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        """Values and gradients."""
        inputs = self.image(shape, groups, dtype, generator)
        if layout == "channels_last":
            inputs = channels_last(inputs)
        actual, exact = on(inputs, native.device), upcast(inputs)
        out, true = self.op(**actual), self.exact(**exact)
        assert_close(out, true, self.bound(native, dtype, inputs))
        cotangent = torch.randn(shape, generator=generator).to(dtype)
        found = torch.autograd.grad(out, self.sensitive(actual), cotangent.to(out.device))
        expected = torch.autograd.grad(true, self.sensitive(exact), cotangent.double())
        for one, other in zip(found, expected, strict=True):
            largest = max(float(other.abs().max()), float(expected[0].abs().max()))  # as above
            assert_close(one, other, torch.full_like(other, (native.tolerance(one.dtype) + 1e-5) * largest))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_frozen_x(self, native: Serving, layout: str, generator: torch.Generator) -> None:
        """Without a gradient in x, the others are the same."""
        inputs = self.image((2, 24, 8, 8), 3, torch.float32, generator)
        if layout == "channels_last":
            inputs = channels_last(inputs)
        cotangent = torch.randn(inputs["x"].shape, generator=generator)
        found = []
        for x in (inputs["x"], inputs["x"].detach()):
            actual = on(inputs | {"x": x}, native.device)
            given = [actual[name] for name in self.differentiable if actual[name].requires_grad]
            found.append(torch.autograd.grad(self.op(**actual), given, cotangent.to(native.device)))
        assert all(map(torch.equal, found[0][1:], found[1]))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("left_out", ["x_shift", "scale", "shift", "residual", "silu", "all"])
    def test_options(self, serving: Serving, left_out: str, layout: str, generator: torch.Generator) -> None:
        """Each argument left out, alone and all together; the others keep their gradients."""
        inputs = self.inputs((2, 2, 5, 7), torch.float32, generator)
        names = ("x_shift", "scale", "shift", "residual", "silu") if left_out == "all" else (left_out,)
        inputs |= {name: False if name == "silu" else None for name in names}
        if layout == "channels_last":
            inputs = channels_last(inputs)
        actual, exact = on(inputs, serving.device), upcast(inputs)
        out, true = self.op(**actual), self.exact(**exact)
        assert_close(out, true, self.bound(serving, out.dtype, inputs))
        given = [name for name in self.differentiable if inputs[name] is not None]
        cotangent = torch.randn(out.shape, generator=generator)
        found = torch.autograd.grad(out, [actual[name] for name in given], cotangent.to(out))
        expected = torch.autograd.grad(true, [exact[name] for name in given], cotangent.double())
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 4e-6)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(("shape", "groups"), [((2, 24, 16, 16), 3), ((1, 48, 32, 32), 1)], ids=str)
    def test_far_from_zero(
        self, fused: Serving, shape: tuple[int, ...], groups: int, layout: str, generator: torch.Generator
    ) -> None:
        """A mean of 1000 standard deviations: E[x^2] - E[x]^2 in float32 would leave nothing of the variance."""
        inputs = self.image(shape, groups, torch.float32, generator)
        inputs |= dict.fromkeys(("x_shift", "scale", "shift", "residual")) | {"silu": False}
        inputs["x"] = inputs["x"].detach() * 0.1 + 100
        if layout == "channels_last":
            inputs = channels_last(inputs)
        # The mean itself is a float32 near 100, of spacing 7.6e-6: 7.6e-5 of the standard deviation.
        assert_close(self.op(**on(inputs, fused.device)), self.exact(**upcast(inputs)), 1e-4)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_flat(self, serving: Serving, layout: str, generator: torch.Generator) -> None:
        """A constant image has no variance: the output is what the bias alone gives, and every gradient is finite."""
        inputs = self.inputs((2, 1, 4, 4), torch.float32, generator) | dict.fromkeys(("x_shift",))
        inputs["x"] = torch.full_like(inputs["x"], 2.0).requires_grad_()
        if layout == "channels_last":
            inputs = channels_last(inputs)
        self.check_values(inputs, serving)
        actual = on(inputs, serving.device)
        given = [actual[name] for name in self.differentiable if inputs[name] is not None]
        assert all(g.isfinite().all() for g in torch.autograd.grad(self.op(**actual).sum(), given))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_not_finite(self, serving: Serving, layout: str, value: float, generator: torch.Generator) -> None:
        """One bad pixel spoils its group of its sample, visibly, and nothing else."""
        inputs = self.inputs((2, 2, 5, 5), torch.float32, generator) | {"residual": None}
        x = inputs["x"].detach().clone()
        clean = self.op(**on(inputs | {"x": x}, serving.device))
        x[1, 7, 2, 3] = value
        given = on(inputs | {"x": x}, serving.device)
        out = self.op(**(channels_last(given) if layout == "channels_last" else given)).detach().cpu()
        assert out[1, 6:12].isnan().all()
        spoilt = torch.zeros(out.shape, dtype=torch.bool)
        spoilt[1, 6:12] = True
        torch.testing.assert_close(out[~spoilt], clean.detach().cpu()[~spoilt], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(("shape", "groups"), [((5, 36, 9, 7), 6), ((5, 24, 8, 8), 3)], ids=str)
    def test_any_batch(
        self, fused: Serving, shape: tuple[int, ...], groups: int, layout: str, generator: torch.Generator
    ) -> None:
        """A sample does not depend on the batch it is in: to the bit."""
        inputs = on(self.image(shape, groups, torch.float32, generator), fused.device)
        if layout == "channels_last":
            inputs = channels_last(inputs)
        whole = self.op(**inputs)
        order = torch.randperm(5, generator=generator).to(fused.device)
        for chosen in (order, order[:1]):
            part: dict[str, Any] = {
                name: v[chosen] if isinstance(v, Tensor) and name not in ("weight", "bias") else v
                for name, v in inputs.items()
            }
            assert torch.equal(self.op(**part), whole[chosen])

    def test_size_messages(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = on(self.inputs((2, 1, 4, 4), torch.float32, generator), serving.device)
        self.check_error(inputs | {"groups": 5}, ValueError, "^groups: expected a divisor of 12 channels, got 5$")
        self.check_error(inputs | {"groups": 0}, ValueError, "^groups: expected a divisor of 12 channels, got 0$")
        self.check_error(inputs | {"eps": 0.0}, ValueError, r"^eps: expected a positive number, got 0\.0$")
        self.check_error(
            inputs | {"residual": inputs["residual"].detach().bfloat16()},
            TypeError,
            "^residual: expected dtype float32, got bfloat16$",
        )

    def test_silu(self, fused: Serving) -> None:
        """SiLU alone, of float32 throughout their range: a weight of zero makes the bias what is activated."""
        own = fused.backend == "cpp" and fused.device.type == "cpu"
        step = 2**20 if fused.backend == "triton" and INTERPRETED else 2**12
        z = torch.arange(0, 2**32, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
        z = z[z.isfinite()]
        x = torch.zeros(1, len(z), 1, 1)
        given = [v.to(fused.device) for v in (x, torch.zeros_like(z), z)]
        out = group_norm_silu(*given, groups=1).flatten().cpu().double()
        exact = z.double() / (1 + torch.exp(-z.double()))
        # Where e^-z overflows float32, below -88, or the quotient's denominator is past what a GPU divides by, 2^126,
        # the true value is within 2e-36 of the zero that is returned. A GPU's exponential is that of 2^x, of a product
        # rounded near 100; the CPU's is to an ulp.
        bound = (4 * 2**-24 if own else 2**-17) * exact.abs() + 2e-36
        assert ((out - exact).abs() <= bound).all(), (
            f"largest {((out - exact).abs() / bound).max():.3g} times the bound"
        )
        for end, expected in ((float("inf"), float("inf")), (-float("inf"), None), (float("nan"), None)):
            value = group_norm_silu(*given[:2], torch.full_like(given[2], end), groups=1)
            assert value.isnan().all() if expected is None else (value == expected).all()

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("batch", [1, 9])
    def test_threads(self, fused: Serving, batch: int, layout: str, generator: torch.Generator) -> None:
        """Values and gradients do not depend on the number of threads: to the bit."""
        if fused.device.type != "cpu":
            pytest.skip("the threads of a CPU")
        inputs = self.image((batch, 192, 17, 15), 32, torch.float32, generator)
        if layout == "channels_last":
            inputs = channels_last(inputs)
        cotangent = torch.randn(inputs["x"].shape, generator=generator)
        found = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = self.op(**inputs)
                found.append((out, *torch.autograd.grad(out, self.sensitive(inputs), cotangent)))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_very_far_from_zero(self, fused: Serving, layout: str, generator: torch.Generator) -> None:
        """A mean of 10,000 standard deviations, on the CPU: its statistics are float64 between tiles of 16."""
        if fused.backend != "cpp" or fused.device.type != "cpu" or fused.cuda_on_cpu:
            pytest.skip("the float64 of the CPU's kernel")
        inputs = self.image((2, 64, 32, 32), 16, torch.float32, generator)
        inputs |= dict.fromkeys(("x_shift", "scale", "shift", "residual"))
        inputs["x"] = inputs["x"].detach() + 1e4
        if layout == "channels_last":
            inputs = channels_last(inputs)
        assert_close(self.op(**inputs), self.exact(**upcast(inputs)), 2e-6)


class TestTiles:
    """Triton's two ways: all pixels of a few groups in registers, which small images take, or tiles of pixels."""

    @pytest.fixture
    def tiles(self, tiled: Serving) -> ModuleType:
        return importlib.import_module("ctm_fast.ops.triton._group_tiles")

    @pytest.fixture
    def parted(self, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """No image fits, and tiles are small: several in an image of the size of a test."""
        monkeypatch.setattr(tiles, "WHOLE_BYTES", 0)
        monkeypatch.setattr(tiles, "TILE", 128)

    @pytest.mark.usefixtures("parted")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize(("shape", "groups"), [((2, 24, 9, 7), 3), ((1, 90, 4, 4), 3), ((2, 7, 9, 5), 1)], ids=str)
    @pytest.mark.parametrize("given", ["all", "bare", "frozen x"])
    def test_parted(
        self,
        tiled: Serving,
        given: str,
        shape: tuple[int, ...],
        groups: int,
        layout: str,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        """Values and gradients, over tiles cut by both edges of an image and groups cut by tiles."""
        row = TestGroupNormSilu()
        inputs = row.image(shape, groups, dtype, generator)
        if given == "bare":
            inputs |= dict.fromkeys(("x_shift", "scale", "shift", "residual")) | {"silu": False, "out_scale": 1.0}
        elif given == "frozen x":
            inputs["x"] = inputs["x"].detach()
        if layout == "channels_last":
            inputs = channels_last(inputs)
        actual, exact = on(inputs, tiled.device), upcast(inputs)
        out, true = row.op(**actual), row.exact(**exact)
        assert_close(out, true, row.bound(tiled, dtype, inputs))
        names = [n for n in row.differentiable if inputs[n] is not None and inputs[n].requires_grad]
        cotangent = torch.randn(out.shape, generator=generator).to(dtype)
        found = torch.autograd.grad(out, [actual[name] for name in names], cotangent.to(out.device))
        expected = torch.autograd.grad(true, [exact[name] for name in names], cotangent.double())
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tiled.tolerance(one.dtype) + 1e-5)

    @pytest.mark.usefixtures("parted")
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_far_from_zero(self, tiled: Serving, layout: str, generator: torch.Generator) -> None:
        """Means of tiles and groups 1000 standard deviations from zero: merged, they leave the variance its digits."""
        row = TestGroupNormSilu()
        inputs = row.image((2, 24, 9, 7), 3, torch.float32, generator)
        inputs |= dict.fromkeys(("x_shift", "scale", "shift", "residual")) | {"silu": False}
        inputs["x"] = inputs["x"].detach() * 0.1 + 100
        if layout == "channels_last":
            inputs = channels_last(inputs)
        assert_close(row.op(**on(inputs, tiled.device)), row.exact(**upcast(inputs)), 1e-4)

    @pytest.mark.usefixtures("parted")
    def test_any_batch(self, tiled: Serving, generator: torch.Generator) -> None:
        """To the bit, forward and backward."""
        row = TestGroupNormSilu()
        inputs = on(row.image((3, 24, 9, 7), 3, torch.float32, generator), tiled.device)
        given = [name for name, v in inputs.items() if isinstance(v, Tensor) and name not in ("weight", "bias")]
        whole = row.op(**inputs)
        gradients = torch.autograd.grad(whole.square().sum(), [inputs[name] for name in given])
        part = {name: v[1:2].detach().requires_grad_() if name in given else v for name, v in inputs.items()}
        out = row.op(**part)
        assert torch.equal(out, whole[1:2])
        for one, other in zip(
            torch.autograd.grad(out.square().sum(), [part[name] for name in given]), gradients, strict=True
        ):
            assert torch.equal(one, other[1:2])

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_programs_own_what_they_write(
        self,
        tiled: Serving,
        tiles: ModuleType,
        layout: str,
        monkeypatch: pytest.MonkeyPatch,
        generator: torch.Generator,
    ) -> None:
        """The first program alone writes its groups, and nothing beside them that a second might write too."""
        row = importlib.import_module("ctm_fast.ops.triton.group_norm_silu")
        monkeypatch.setattr(row, "wrap_triton", lambda kernel: collections.defaultdict(lambda: kernel[(1,)]))
        monkeypatch.setattr(tiles, "TILE", 64)  # as few groups to a program as there can be
        inputs = on(TestGroupNormSilu().image((2, 72, 3, 5), 6, torch.float32, generator), tiled.device)
        if layout == "channels_last":
            inputs = channels_last(inputs)
        run = tiles.whole_tile(inputs["x"], 6).SET
        assert run == 12
        out = group_norm_silu(**inputs | {"x": inputs["x"].detach()})
        assert out[0, :run].isfinite().all()
        assert out[0, run:].isnan().all() and out[1:].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("width", GROUP_WIDTHS)
    def test_plan(self, tiles: ModuleType, width: int, layout: str, dtype: torch.dtype) -> None:
        """Whole groups of whole vectors that fit, or tiles that fit; where not, the image is too large."""
        for size in (1, 8, 16, 32, 64):
            x = torch.empty(2, 32 * width, size, size, dtype=dtype, device="meta")
            if layout == "channels_last":
                x = x.to(memory_format=torch.channels_last)
            vector = 1 if x.is_contiguous() else 16 // x.element_size()
            whole = tiles.whole_tile(x, 32)
            if whole is None:
                assert size * size * width * x.element_size() * 8 > tiles.WHOLE_BYTES
            else:
                run, rows, lanes, groups = whole
                assert run % width == 0 and (run % vector == 0 or run == 32 * width)
                assert rows >= size * size and lanes >= run and groups >= run // width
                assert rows * lanes * x.element_size() <= tiles.WHOLE_BYTES
                assert tiles.warps(whole) in (4, 8, 16)
            rows, lanes = tiles.part_tile(x)
            assert rows * lanes <= tiles.TILE
            assert tiles.merge_tile(x, 32)[1] >= width
