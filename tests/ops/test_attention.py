"""The row attention: what the harness asks of every op, and what is particular to a softmax over an image's pixels."""

import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.ops import _library, attention, use_reference
from ctm_fast.ops._library import INTERPRETED, SERVES
from ctm_fast.ops._library import serving as serving_of
from tests.ops.harness import TOLERANCE, Gradients, Inputs, Serving, assert_close, channels_last, on, upcast
from tests.ops.harness import _Recorder as Recorder

SIDES = {1: (1, 1), 7: (7, 1), 64: (8, 8), 65: (5, 13), 200: (8, 25), 256: (16, 16), 1024: (32, 32)}
"""Tokens -> an image of that many pixels: powers of two, and blocks that are cut."""


class Copies(TorchDispatchMode):
    """Names every copy of a tensor that is made in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


class TestAttention(Gradients):
    op = staticmethod(attention)
    anchor = "qkv"
    differentiable = ("qkv",)
    constants: ClassVar[tuple[str, ...]] = ()
    twice = False

    @pytest.fixture(autouse=True)
    def _no_bfloat16_products(self, request: pytest.FixtureRequest) -> None:
        values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        kernel = values.get("serving") or values.get("fused")
        if kernel and kernel.backend == "triton" and INTERPRETED and values.get("dtype") == torch.bfloat16:
            pytest.skip("Triton's interpreter computes tl.dot on bfloat16 wrongly")

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """A head of 8 for each channel asked for; sides are cut at 7, because work grows with their fourth power."""
        batch, channels, height, width = shape
        return self.image((batch, max(1, channels), 8, min(height, 7), min(width, 7)), dtype, generator)

    def image(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """For ``shape`` [B, heads, D, H, W]."""
        batch, heads, size, height, width = shape
        qkv = torch.randn(batch, 3 * heads * size, height, width, generator=generator).to(dtype)
        return {"qkv": qkv.requires_grad_(), "heads": heads}

    def exact(self, qkv: Tensor, heads: int) -> Tensor:
        batch, channels, height, width = qkv.shape
        q, k, v = qkv.reshape(batch, 3, heads, channels // (3 * heads), height * width).unbind(1)
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
        weights = (scores - scores.amax(3, keepdim=True)).exp()
        out = torch.einsum("bhij,bhdj->bhdi", weights / weights.sum(3, keepdim=True), v)
        return out.reshape(batch, channels // 3, height, width)

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> float:
        """In half precision the fused kernels round the weights for the tensor cores, and then the output."""
        return TOLERANCE[dtype] * (1 if serving.backend == "reference" else 2) + 2e-6

    def gradient_bound(self, serving: Serving, dtype: torch.dtype) -> float:
        """As above, and the output enters the gradient as it was stored; in float32 sums of as many as N D."""
        return TOLERANCE[dtype] * (2 if serving.backend == "reference" else 4) + 4e-6

    def varieties(self, generator: torch.Generator) -> list[Inputs]:
        plain = super().varieties(generator)
        return [*plain, channels_last(self.image((2, 2, 24, 3, 5), torch.float16, generator))]

    def check(self, inputs: Inputs, serving: Serving, bound: float = 0.0) -> None:
        """Values and gradients, within ``bound`` where it is given."""
        actual, exact = on(inputs, serving.device), upcast(inputs)
        out, true = self.op(**actual), self.exact(**exact)
        dtype = inputs["qkv"].dtype
        assert out.dtype == dtype
        assert last(out)
        assert_close(out, true, bound or self.bound(serving, dtype, inputs))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        (found,) = torch.autograd.grad(out, actual["qkv"], cotangent.to(out.device))
        (expected,) = torch.autograd.grad(true, exact["qkv"], cotangent.double())
        assert found.dtype == dtype
        parts = zip(found.chunk(3, 1), expected.chunk(3, 1), strict=True)
        for part, truth in parts:  # dq, dk and dv apart: the largest of them would hide an error of the others
            largest = truth.abs().amax().clamp(min=expected.abs().amax() / 16)
            assert_close(part, truth, torch.full_like(truth, (bound or self.gradient_bound(serving, dtype)) * largest))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("size", [8, 32, 64, 128, 256])
    @pytest.mark.parametrize("tokens", [1, 7, 64, 65, 256])
    def test_sizes(
        self, serving: Serving, tokens: int, size: int, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        heads = 1 + (tokens + size // 8) % 4 if tokens < 256 else 1
        self.check(self.image((2, heads, size, *SIDES[tokens]), dtype, generator), serving)

    @pytest.mark.parametrize(("tokens", "heads", "size"), [(200, 2, 8), (200, 1, 64), (1024, 1, 32)])
    def test_many_tokens(
        self, serving: Serving, tokens: int, heads: int, size: int, generator: torch.Generator
    ) -> None:
        """Several blocks of queries and of keys, the last of either cut or not."""
        self.check(self.image((1, heads, size, *SIDES[tokens]), torch.float32, generator), serving)

    @pytest.mark.parametrize("size", [1, 5, 16, 24, 48, 100])
    def test_odd_head_sizes(self, serving: Serving, size: int, generator: torch.Generator) -> None:
        """Padded to a power of two, and the next head's channels are not taken for its own."""
        self.check(self.image((2, 3, size, 3, 5), torch.float32, generator), serving)

    @pytest.mark.parametrize("heads", [1, 2, 3, 4])
    def test_heads(self, serving: Serving, heads: int, generator: torch.Generator) -> None:
        """Each head sees its own channels alone: to the bit, as if it were the only one."""
        inputs = on(self.image((2, heads, 16, 6, 7), torch.float32, generator), serving.device)
        qkv = inputs["qkv"].detach().unflatten(1, (3, heads, 16))
        alone = [attention(qkv[:, :, head].flatten(1, 2), heads=1) for head in range(heads)]
        self.check(inputs, serving)
        torch.testing.assert_close(torch.cat(alone, 1), attention(**inputs), rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("tokens", [64, 65])
    def test_large_scores(self, serving: Serving, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Of some hundreds either way, whose exponentials overflow: the same sharp softmax."""
        inputs = self.image((2, 2, 32, *SIDES[tokens]), torch.float32, generator)
        inputs["qkv"] = (inputs["qkv"].detach() * 8).to(dtype).requires_grad_()
        largest = (inputs["qkv"][:, :64].float().square().sum(1) / 32**0.5).max()
        assert largest > 200
        # A score of 400 carries an error of 400 float32 ulps, and a weight that relative error.
        self.check(inputs, serving, bound=2e-4 if dtype == torch.float32 else 3e-3)

    @pytest.mark.parametrize("score", [-300.0, 300.0])
    @pytest.mark.parametrize("tokens", [1, 7, 64, 65])
    def test_all_scores_equal(self, serving: Serving, tokens: int, score: float, generator: torch.Generator) -> None:
        """The mean of v, whatever the score is: no key that is missing weighs in, forward or backward."""
        inputs = self.image((2, 1, 16, *SIDES[tokens]), torch.float32, generator)
        qkv = inputs["qkv"].detach()
        qkv[:, :16] = 1.0
        qkv[:, 16:32] = score / 4
        qkv = qkv.to(serving.device).requires_grad_()
        out = attention(qkv, heads=1)
        v = qkv.detach()[:, 32:]
        mean = v.mean((2, 3), keepdim=True).expand_as(v)
        torch.testing.assert_close(out, mean, rtol=1e-5, atol=1e-5)
        cotangent = torch.randn(out.shape, generator=generator).to(out)
        (found,) = torch.autograd.grad(out, qkv, cotangent)
        expected = cotangent.mean((2, 3), keepdim=True).expand_as(v)
        torch.testing.assert_close(found[:, 32:], expected, rtol=2e-4, atol=2e-5)
        # q is the same for all pixels, and so is k: the gradients in scores sum to zero over the keys.
        assert found[:, :16].abs().max() <= 1e-3 * abs(score)
        assert found.isfinite().all()

    @pytest.mark.parametrize("shape", [(0, 2, 8, 4, 4), (2, 2, 8, 0, 4)], ids=["batch", "tokens"])
    def test_empty(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        inputs = on(self.image(shape, torch.float32, generator), serving.device)
        out = attention(**inputs)
        assert out.shape == (shape[0], 16, *shape[3:])
        (gradient,) = torch.autograd.grad(out.sum(), inputs["qkv"])
        assert gradient.shape == inputs["qkv"].shape

    @pytest.mark.parametrize("shape", [(2, 2, 16, 5, 7), (2, 1, 64, 8, 8), (1, 3, 8, 1, 1)], ids=str)
    def test_in_place(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        """In channels_last nothing is copied on the way in or out, and the gradient arrives as it is wanted."""
        inputs = on(channels_last(self.image(shape, torch.float32, generator)), serving.device)
        with Copies() as copies, Recorder() as recorder:
            out = attention(**inputs)
        if serving.backend != "reference":  # which transposes and computes in float32
            assert not copies.found
        assert last(out)
        cotangent = torch.randn(out.shape, generator=generator).to(out).contiguous(memory_format=torch.channels_last)
        with Copies() as copies, recorder:
            (gradient,) = torch.autograd.grad(out, inputs["qkv"], cotangent)
        assert last(gradient)
        if serving.backend == "triton":
            assert not copies.found
            (_, forward), (_, backward) = recorder.calls
            assert forward[0].data_ptr() == backward[1].data_ptr() == inputs["qkv"].data_ptr()
            assert backward[0].data_ptr() == cotangent.data_ptr()
            assert backward[2].data_ptr() == out.data_ptr()

    @pytest.mark.parametrize("spoil", ["contiguous", "transposed", "strided", "every other"])
    def test_layouts(self, serving: Serving, spoil: str, generator: torch.Generator) -> None:
        """The same numbers in other memory: the same bits, and an output in channels_last."""
        inputs = on(channels_last(self.image((4, 2, 16, 6, 6), torch.float32, generator)), serving.device)
        qkv = inputs["qkv"].detach()
        other = {
            "contiguous": qkv.contiguous(),
            "transposed": qkv.transpose(2, 3).contiguous().transpose(2, 3),
            "strided": torch.stack((qkv, qkv + 1), -1)[..., 0],
            "every other": torch.stack((qkv, qkv + 1), 1).flatten(0, 1)[::2],
        }[spoil]
        assert torch.equal(other, qkv)
        assert not last(other)
        expected, found = attention(qkv, heads=2), attention(other, heads=2)
        assert torch.equal(expected, found)
        assert last(found)

    def test_same_bits(self, serving: Serving, generator: torch.Generator) -> None:
        """Every time, and whatever the batch is: no sum is in an order of chance."""
        inputs = on(self.image((3, 2, 16, 9, 9), torch.float32, generator), serving.device)
        cotangent = torch.randn(3, 32, 9, 9, generator=generator).to(serving.device)

        def gradient(chosen: slice) -> Tensor:
            qkv = inputs["qkv"].detach()[chosen].requires_grad_()
            return torch.autograd.grad(attention(qkv, heads=2), qkv, cotangent[chosen])[0]

        whole = gradient(slice(None))
        assert torch.equal(whole, gradient(slice(None)))
        if serving.backend == "triton":  # libraries may cut a batch as they like
            assert torch.equal(whole[1:2], gradient(slice(1, 2)))

    @pytest.mark.parametrize("dtype", [torch.float32], ids=str)
    def test_double_backward(self, serving: Serving, dtype: torch.dtype, generator: torch.Generator) -> None:
        """The reference has it; the fused kernels say that they have not, PyTorch's in PyTorch's words."""
        if serving.backend != "sdpa":
            super().test_double_backward(serving, dtype, generator)
            return
        inputs = on(self.inputs((3, 3, 5, 7), dtype, generator), serving.device)
        with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
            torch.autograd.grad(self._penalty(self.op, inputs), self.sensitive(inputs))

    def test_forward_mode_of_sdpa(self, serving: Serving, generator: torch.Generator) -> None:
        """PyTorch's kernels have no forward mode and raise, rather than give zeros."""
        if serving.backend != "sdpa":
            pytest.skip("see test_forward_mode_raises and test_reference_derivatives")
        qkv = self.inputs((1, 1, 5, 7), torch.float32, generator)["qkv"].detach().to(serving.device)
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(lambda one: attention(one, heads=1), (qkv,), (torch.ones_like(qkv),))

    @pytest.mark.parametrize(
        ("channels", "heads", "message"),
        [
            (10, 1, r"^qkv: expected shape \[B, 3 C, H, W\], got \[2, 10, 4, 4\]$"),
            (0, 1, r"^qkv: expected shape \[B, 3 C, H, W\], got \[2, 0, 4, 4\]$"),
            (12, 3, "^heads: expected a divisor of 4 channels, got 3$"),
            (12, 0, "^heads: expected a divisor of 4 channels, got 0$"),
            (12, -2, "^heads: expected a divisor of 4 channels, got -2$"),
        ],
    )
    def test_numbers(self, channels: int, heads: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            attention(torch.zeros(2, channels, 4, 4), heads=heads)

    def test_head_too_large(self, fused: Serving) -> None:
        qkv = torch.zeros(1, 3 * 257, 2, 2, device=fused.device)
        with pytest.raises(ValueError, match=r"^heads: expected up to 256 channels a head .*, got 257$"):
            attention(qkv, heads=1)

    def test_guards(self, fused: Serving, generator: torch.Generator) -> None:
        """NaN behind the last image of every input is not read, and behind every output it stays."""
        kernels = importlib.import_module("ctm_fast.ops.triton.attention")
        batch, heads, size, tokens = 2, 2, 24, 65
        channels = heads * size
        widths = {"qkv": 3 * channels, "grad": channels, "out": channels, "d_qkv": 3 * channels}
        memory = {
            name: torch.full((batch + 1, tokens, width), math.nan, device=fused.device)
            for name, width in {**widths, "lse": heads, "delta": heads}.items()
        }
        given = {name: whole[:batch] for name, whole in memory.items()}
        for name in ("qkv", "grad"):
            given[name].copy_(torch.randn(given[name].shape, generator=generator))
        constants = kernels._constants(given["qkv"].unflatten(1, (5, 13)).permute(0, 3, 1, 2), heads)
        parts = {"KEYS": True, "VALUES": True}
        for kernel, block, names, more in [
            (kernels._forward, "BLOCK_M", ("qkv", "out", "lse"), {}),
            (kernels._backward_q, "BLOCK_M", ("grad", "qkv", "out", "lse", "delta", "d_qkv"), {}),
            (kernels._backward_kv, "BLOCK_N", ("grad", "qkv", "lse", "delta", "d_qkv"), parts),
        ]:

            def grid(meta: dict[str, Any], block: str = block) -> tuple[int]:
                return (batch * heads * -(-tokens // meta[block]),)

            kernel[grid](*(given[name] for name in names), heads, **constants, **more)
        for whole in memory.values():
            assert whole[:batch].isfinite().all()
            assert whole[batch].isnan().all()

    def test_log_of_the_denominator(self, serving: Serving, generator: torch.Generator) -> None:
        """What the forward pass leaves for the backward pass."""
        if serving.backend == "sdpa":
            pytest.skip("PyTorch keeps it to itself")
        inputs = on(channels_last(self.image((2, 3, 24, 5, 13), torch.float32, generator)), serving.device)
        q, k, _ = inputs["qkv"].detach().double().cpu().reshape(2, 3, 3, 24, 65).unbind(1)
        exact = (torch.einsum("bhdi,bhdj->bhij", q, k) / 24**0.5).logsumexp(3)
        assert_close(_library._kernels["attention"][serving.backend](**inputs)[1], exact, 2e-6)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, tuple[str, ...]], None]:
    """Plants an entry in the table of defaults on a CPU; all is as before when the test is over."""
    monkeypatch.setattr(_library, "_default", dict(_library._default))

    def plant(entry: str, backends: tuple[str, ...]) -> None:
        for compiling in (False, True):
            monkeypatch.setitem(SERVES["cpu", compiling], entry, backends)
        _library._choose("attention")

    return plant


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels serve everything on a CPU")
@pytest.mark.skipif(_library._forced is not None, reason="CTM_FAST_REFERENCE=1 overrules the table")
class TestDefaults:
    """Which kernel serves may depend on the size: pixels x channels of a head."""

    def served(self, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]) -> list[str]:
        calls: list[str] = []
        for backend, kernel in _library._kernels["attention"].items():

            def spy(*args: Any, backend: str = backend, kernel: Callable[..., Any] = kernel) -> Any:
                calls.append(backend)
                return kernel(*args)

            monkeypatch.setitem(_library._kernels["attention"], backend, spy)
        call()
        monkeypatch.undo()
        return calls

    @pytest.mark.parametrize("compiling", [False, True])
    def test_entry_of_a_size(
        self, table: Callable[[str, tuple[str, ...]], None], compiling: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert serving_of("attention", "cpu", compiling=compiling, case="16x8") == "sdpa"
        table("attention 16x8", ("reference",))
        assert serving_of("attention", "cpu", compiling=compiling, case="16x8") == "reference"
        for other in (None, "16x16", "8x8", "6x8"):
            assert serving_of("attention", "cpu", compiling=compiling, case=other) == "sdpa"

    def test_a_call_goes_by_its_size(
        self, table: Callable[[str, tuple[str, ...]], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table("attention 16x8", ("reference",))
        sizes = [((2, 48, 4, 4), 2, "reference"), ((2, 48, 4, 4), 1, "sdpa"), ((2, 48, 2, 4), 2, "sdpa")]
        for shape, heads, expected in sizes:
            with monkeypatch.context() as patch:
                call = lambda shape=shape, heads=heads: attention(torch.zeros(shape), heads=heads)  # noqa: E731
                assert self.served(patch, call) == [expected]

    def test_what_is_not_there_yields(self, table: Callable[[str, tuple[str, ...]], None]) -> None:
        table("attention 16x8", ("triton", "sdpa"))
        assert serving_of("attention", "cpu", case="16x8") == "sdpa"
        table("attention 16x8", ("triton",))
        assert serving_of("attention", "cpu", case="16x8") == "reference"

    def test_the_table_is_put_back(self) -> None:
        assert serving_of("attention", "cpu", case="16x8") == "sdpa"

    def test_forced(self, table: Callable[[str, tuple[str, ...]], None]) -> None:
        table("attention 16x8", ("sdpa",))
        with use_reference():
            assert serving_of("attention", "cpu", case="16x8") == "reference"
