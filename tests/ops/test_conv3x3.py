"""The row conv3x3: what the harness asks of every op, and what is particular to Winograd's way of convolving."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.ops import conv3x3, conv3x3_pack, conv3x3_packed, packing_pays, use_backend
from ctm_fast.ops import serving as serving_of
from ctm_fast.ops.conv3x3 import FEWEST_TILES
from ctm_fast.ops.reference.conv3x3 import conv3x3_packed as reference_packed
from tests.ops.harness import Gradients, Inputs, Serving, assert_close, channels_last, upcast

LOSS = 6e-6
"""Of float32, over the largest value: about twice that of a direct convolution, and then three times, for safety."""


class Calls(TorchDispatchMode):
    """Names the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def skip_without(lanes: int) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if lanes > {"AVX512": 16, "AVX2": 8}.get(capability, 4):
        pytest.skip(f"this CPU has no vectors of {lanes} floats: {capability}")


class TestConv3x3(Gradients):
    op = staticmethod(conv3x3)
    anchor = "x"
    differentiable = ("x", "weight", "bias")
    constants: ClassVar[tuple[str, ...]] = ()
    devices = ("cpu",)
    rounding = 4e-5

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """16 channels for each asked for, as the kernel takes them, to 80: a panel of outputs, and a rest."""
        batch, channels, height, width = shape
        return self.image((batch, 16 * max(1, channels), 80, height, width), dtype, generator)

    def image(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """For ``shape`` [B, C, K, H, W]."""
        batch, inputs, outputs, height, width = shape
        made = {
            "x": torch.randn(batch, inputs, height, width, generator=generator),
            "weight": torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5,
            "bias": torch.randn(outputs, generator=generator),
        }
        return channels_last({name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()})

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        y = sum(
            torch.einsum("bchw,kc->bkhw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
            for i in range(3)
            for j in range(3)
        )
        assert isinstance(y, Tensor)
        return y if bias is None else y + bias.view(1, -1, 1, 1)

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> float:
        return serving.tolerance(dtype) + LOSS

    def gradient_bound(self, serving: Serving, dtype: torch.dtype) -> float:
        """The gradient of weight and bias is a sum over all pixels, which PyTorch adds up one by one, and as stored."""
        bound = (1 if dtype == torch.float32 else 4) * serving.tolerance(dtype) + 3 * LOSS
        return bound + 1e-4 if serving.backend == "reference" else bound

    @pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 9, 13, 32])
    @pytest.mark.parametrize("channels", [(16, 16), (32, 48), (48, 80), (64, 128), (160, 96), (16, 144)], ids=str)
    def test_sizes(self, serving: Serving, side: int, channels: tuple[int, int], generator: torch.Generator) -> None:
        """Tiles that are cut, panels of 64 outputs that are not full, images not square."""
        inputs = self.image((1 + 100 // side**2, *channels, side, side + side % 3), torch.float32, generator)
        self.check_values(inputs, serving)

    def test_without_bias(self, serving: Serving, generator: torch.Generator) -> None:
        self.check_values(self.image((3, 32, 32, 16, 16), torch.float32, generator) | {"bias": None}, serving)

    def test_border(self, serving: Serving) -> None:
        """Of ones by ones: the number of pixels under the filter, and nothing from beyond the border or the tile."""
        x, weight = torch.ones(4, 16, 16, 17), torch.zeros(16, 16, 3, 3)
        weight[:, 0] = 1
        rows, columns = (torch.tensor([2.0] + [3.0] * (side - 2) + [2.0]) for side in (16, 17))
        expected = (rows[:, None] * columns).expand(4, 16, -1, -1)
        found = conv3x3(**channels_last({"x": x, "weight": weight}))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    def test_who_serves(self, native: Serving, generator: torch.Generator) -> None:
        """The kernel where it can, PyTorch's convolution for another dtype, format or number of channels."""
        fit = self.image((2, 32, 32, 24, 24), torch.float32, generator)
        odd = self.image((2, 24, 32, 24, 24), torch.float32, generator)
        low = self.image((2, 32, 32, 24, 24), torch.bfloat16, generator)
        plain = fit | {"x": fit["x"].detach().contiguous()}
        for inputs, ours in ((fit, True), (odd, False), (low, False), (plain, False)):
            with Calls() as calls, torch.no_grad():
                out = conv3x3(**inputs)
            assert ("ctm_fast::conv3x3" in calls.names) == ours
            assert ("aten::convolution" in calls.names) == (not ours)
            assert out.dtype == inputs["x"].dtype

    def test_few_tiles(self, generator: torch.Generator) -> None:
        """By default PyTorch serves images too few to be worth the transform of the weights."""
        if serving_of("conv3x3", "cpu") == "reference":
            pytest.skip("no Winograd on this CPU")
        for batch, ours in ((FEWEST_TILES // 4 - 1, False), (FEWEST_TILES // 4, True)):
            with Calls() as calls:
                conv3x3(**self.image((batch, 16, 16, 8, 8), torch.float32, generator))
            assert ("ctm_fast::conv3x3" in calls.names) == ours

    @pytest.mark.parametrize("outputs", [16, 32, 48, 64, 80, 144])
    @pytest.mark.parametrize("lanes", [4, 8, 16])
    def test_weight_gradient(self, native: Serving, lanes: int, outputs: int, generator: torch.Generator) -> None:
        """Of every width of vectors, panels that are not full, a rest of inputs, more tiles than one sum holds."""
        skip_without(lanes)
        for inputs, batch, side in ((16, 1, 3), (32, 9, 16), (64, 2, 9)):
            values = self.image((batch, inputs, outputs, side, side + 1), torch.float32, generator)
            cotangent = torch.randn(batch, outputs, side, side + 1, generator=generator)
            weight = values["weight"].detach().double().requires_grad_()
            exact = self.exact(values["x"].detach().double(), weight, None)
            (expected,) = torch.autograd.grad(exact, weight, cotangent.double())
            grad = cotangent.contiguous(memory_format=torch.channels_last)
            found = torch.ops.ctm_fast.conv3x3_weight_grad(grad, values["x"].detach(), lanes)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert_close(found[None], expected[None], 2 * LOSS)

    def test_many_channels(self, native: Serving, generator: torch.Generator) -> None:
        """The error does not grow with their number."""
        self.check_values(self.image((1, 1536, 16, 9, 9), torch.float32, generator), native)

    def test_strided_bias(self, serving: Serving, generator: torch.Generator) -> None:
        """At any number of images, whoever serves."""
        for batch in (1, 9):
            inputs = self.image((batch, 16, 32, 12, 12), torch.float32, generator)
            inputs["bias"] = torch.stack([inputs["bias"].detach()] * 2, 1)[:, 0]
            self.check_values(inputs, serving)

    def test_autocast(self, serving: Serving, generator: torch.Generator) -> None:
        """PyTorch's convolution, in the dtype of autocast, at any number of images."""
        for batch in (1, 9):
            inputs = self.image((batch, 16, 32, 12, 12), torch.float32, generator)
            with torch.autocast("cpu", torch.bfloat16):
                assert conv3x3(**inputs).dtype == torch.bfloat16

    def test_input_gradient_is_ours(self, native: Serving, generator: torch.Generator) -> None:
        """And the one in the weights is not asked for where they are frozen."""
        inputs = self.image((2, 32, 48, 24, 24), torch.float32, generator)
        out = conv3x3(inputs["x"], inputs["weight"].detach(), inputs["bias"].detach())
        with Calls() as calls:
            out.backward(torch.ones_like(out))
        assert "ctm_fast::conv3x3" in calls.names
        assert "aten::convolution_backward" not in calls.names


class TestPacked:
    """Weights that were transformed beforehand."""

    op = staticmethod(conv3x3_packed)
    devices = ("cpu",)

    def problem(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Inputs, Tensor]:
        inputs = TestConv3x3().image(shape, torch.float32, generator)
        inputs = {name: tensor.detach() for name, tensor in inputs.items()}
        return inputs, TestConv3x3().exact(**upcast(inputs))

    @pytest.mark.parametrize("shape", [(2, 16, 16, 5, 7), (3, 48, 80, 8, 8), (1, 64, 128, 12, 9)], ids=str)
    @pytest.mark.parametrize("strides", ["contiguous", "channels_last", "transposed"])
    def test_values(self, serving: Serving, shape: tuple[int, ...], strides: str, generator: torch.Generator) -> None:
        inputs, exact = self.problem(shape, generator)
        weight = inputs["weight"]
        if strides == "transposed":
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        elif strides == "contiguous":
            weight = weight.contiguous()
        packed = conv3x3_pack(weight)
        assert packed.shape == (36, shape[1], shape[2])
        assert_close(conv3x3_packed(inputs["x"], packed, inputs["bias"]), exact, LOSS)

    @pytest.mark.parametrize("outputs", [16, 32, 48, 64, 80, 112, 144])
    @pytest.mark.parametrize("inputs", [32, 512], ids=["few weights", "many"])
    @pytest.mark.parametrize("lanes", [4, 8, 16])
    def test_every_width_of_vectors(
        self, native: Serving, lanes: int, inputs: int, outputs: int, generator: torch.Generator
    ) -> None:
        """Each with its own number of products in registers, and every rest of a panel and of tiles; many weights are
        asked for ahead."""
        skip_without(lanes)
        for batch in range(1, 8):
            values, exact = self.problem((batch, inputs, outputs, 3, 4), generator)
            packed = conv3x3_pack(values["weight"])
            assert_close(conv3x3_packed(values["x"], packed, values["bias"], lanes=lanes), exact, LOSS)

    def test_error(self, native: Serving, generator: torch.Generator) -> None:
        """In the root mean square at most twice a direct convolution's at 256 channels; the usual points lose 3.5."""
        inputs, exact = self.problem((1, 256, 64, 32, 32), generator)

        def loss(y: Tensor) -> float:
            return float((y.double() - exact).square().mean().sqrt())

        direct = loss(torch.nn.functional.conv2d(**inputs, padding=1))
        found = loss(conv3x3_packed(inputs["x"], conv3x3_pack(inputs["weight"]), inputs["bias"]))
        assert found <= 2 * max(direct, 5e-7)

    def test_batch_is_not_seen(self, native: Serving, generator: torch.Generator) -> None:
        """Not in a bit: neither the other images nor the number of threads."""
        inputs, _ = self.problem((9, 64, 80, 13, 13), generator)
        packed = conv3x3_pack(inputs["weight"])
        together = conv3x3_packed(inputs["x"], packed, inputs["bias"])
        torch.set_num_threads(2)
        for i in range(9):
            alone = conv3x3_packed(inputs["x"][i : i + 1].contiguous(), packed, inputs["bias"])
            assert torch.equal(alone[0], together[i])

    def test_kernels_agree_on_the_order(self, native: Serving, generator: torch.Generator) -> None:
        """The reference reads the kernel's packed weights, and packs the same."""
        inputs, exact = self.problem((2, 32, 80, 6, 6), generator)
        packed = conv3x3_pack(inputs["weight"])
        with use_backend("reference"):
            torch.testing.assert_close(conv3x3_pack(inputs["weight"]), packed, rtol=1e-6, atol=1e-7)
        assert_close(reference_packed(inputs["x"], packed, inputs["bias"], 0), exact, LOSS)

    def test_no_gradient(self, serving: Serving, generator: torch.Generator) -> None:
        """It raises where one is asked for, and does not lose it."""
        inputs, _ = self.problem((2, 16, 16, 4, 4), generator)
        packed = conv3x3_pack(inputs["weight"].requires_grad_())
        assert not packed.requires_grad
        x = inputs["x"].requires_grad_()
        with pytest.raises(NotImplementedError, match="conv3x3_packed: there is no gradient"):
            conv3x3_packed(x, packed)
        with torch.no_grad():
            conv3x3_packed(x, packed)

    def test_messages(self, serving: Serving) -> None:
        x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(32, 16, 3, 3)
        packed = conv3x3_pack(weight)
        with pytest.raises(ValueError, match=r"^weight: expected multiples of 16 channels, got 16 in and 8 out$"):
            conv3x3_pack(torch.zeros(8, 16, 3, 3))
        with pytest.raises(ValueError, match=r"^weight: expected shape \[32, 16, 3, 3\], got \[32, 16, 1, 1\]$"):
            conv3x3_pack(torch.zeros(32, 16, 1, 1))
        with pytest.raises(TypeError, match=r"^weight: expected dtype float32, got float16$"):
            conv3x3_pack(weight.half())
        with pytest.raises(ValueError, match=r"^packed: expected shape \[36, 32, 32\], got \[36, 16, 32\]$"):
            conv3x3_packed(torch.zeros(1, 32, 4, 4), packed)
        with pytest.raises(ValueError, match=r"^bias: expected shape \[32\], got \[16\]$"):
            conv3x3_packed(x, packed, torch.zeros(16))
        with pytest.raises(TypeError, match=r"^packed: expected a tensor, got list$"):
            conv3x3_packed(x, [packed])  # type: ignore[arg-type]

    def test_cpp_checks(self, native: Serving) -> None:
        """What would corrupt memory is checked once more behind Python."""
        ops = torch.ops.ctm_fast
        x = torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
        packed = conv3x3_pack(torch.zeros(32, 16, 3, 3))
        for arguments, message in (
            ((torch.zeros(1, 16, 4, 4), packed, None, 0), "x: expected a channels_last tensor"),
            ((x.double(), packed, None, 0), "x: expected dtype Float"),
            ((x, packed[:, :8], None, 0), "packed: expected a contiguous tensor"),
            ((x, packed[:, :8].contiguous(), None, 0), r"packed: expected shape \[36, 16, 32\]"),
            ((x, packed, torch.zeros(16), 0), r"bias: expected shape \[32\]"),
            ((x, packed, None, 5), "lanes: expected 0, 4, 8 or 16"),
        ):
            with pytest.raises(RuntimeError, match=f"conv3x3: {message}"):
                ops.conv3x3_packed(*arguments)
        with pytest.raises(RuntimeError, match="weight: expected a multiple of 16 channels, got 8"):
            ops.conv3x3_pack(torch.zeros(8, 16, 3, 3))


def test_packing_pays() -> None:
    served = serving_of("conv3x3_packed", "cpu") == "cpp"
    assert packing_pays(64, 64, torch.float32) == served
    assert not packing_pays(3, 64, torch.float32)
    assert not packing_pays(64, 3, torch.float32)
    assert not packing_pays(64, 64, torch.bfloat16)
    with use_backend("reference"):
        assert not packing_pays(64, 64, torch.float32)
