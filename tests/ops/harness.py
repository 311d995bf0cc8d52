"""What is asked of every op, once. A row's test file derives a class from these and adds the op's own properties.

    class TestPrecondInput(Gradients, Images): ...

``Op`` asks for values, hygiene, registration, compilation and messages; ``Images`` for memory formats besides,
``Gradients`` for derivatives. The inputs are a dict of keyword arguments of the public function, made on the CPU by
``inputs``; the truth is ``exact``, the paper's formula in float64 as the test file writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.ops._library import INTERPRETED, Backend, use_reference

Inputs = dict[str, Any]

LOW = (torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 1, 11, 13),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
    (2, 3, 40, 40),  # several blocks to an image, the last one cut
    (5, 4, 16, 16),  # whole vectors
]
"""[B, C, H, W]: what kernels get wrong at their edges."""

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6, torch.float16: 2**-11 + 2e-6}
"""Largest error over the largest value of the sample: half an ulp of the dtype stored, and what float32 loses."""


@dataclass(frozen=True)
class Serving:
    """A kernel under test, and the device it runs on."""

    backend: Backend
    device: torch.device
    cuda_on_cpu: bool = False
    """The CUDA kernels in the place of the CPU's (tests/cuda_on_cpu)."""

    def tolerance(self, dtype: torch.dtype) -> float:
        if dtype == torch.bfloat16 and self.backend == "triton" and INTERPRETED:
            return 2 * TOLERANCE[dtype]  # the interpreter truncates to bfloat16; compiled, the kernel rounds (cvt.rn)
        return TOLERANCE[dtype]


def levels(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(t, s), [batch] float32: t log-uniform in [0.002, 80], s uniform in [0, t], with its two ends among the first."""
    t = 0.002 * 40000 ** torch.rand(batch, generator=generator)
    s = t * torch.rand(batch, generator=generator)
    s[1:2] = 0
    s[2:3] = t[2:3]
    return t, s


def outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def leaf(tensor: Tensor, **to: Any) -> Tensor:
    """``tensor.to(...)`` as a tensor of its own, which wants a gradient if ``tensor`` does."""
    return tensor.detach().to(**to).requires_grad_(tensor.requires_grad)


def on(inputs: Inputs, device: torch.device) -> Inputs:
    """The same numbers on ``device``; where they are there, in the same memory."""
    return inputs | {name: leaf(tensor, device=device) for name, tensor in tensors(inputs).items()}


def upcast(inputs: Inputs) -> Inputs:
    """The same numbers on the CPU, in float64."""
    inputs = on(inputs, torch.device("cpu"))
    floats = {name: tensor for name, tensor in tensors(inputs).items() if tensor.is_floating_point()}
    return inputs | {name: leaf(tensor, dtype=torch.float64) for name, tensor in floats.items()}


def channels_last(inputs: Inputs) -> Inputs:
    """The same inputs, the images among them in channels_last."""
    images = {name: tensor for name, tensor in tensors(inputs).items() if tensor.dim() == 4}
    return inputs | {name: leaf(tensor, memory_format=torch.channels_last) for name, tensor in images.items()}


def randn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normals of the shape, dtype and device of ``tensor``, drawn on the CPU."""
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def assert_close(actual: Tensor, exact: Tensor, bound: float | Tensor) -> None:
    """Per sample (first axis), max|actual - exact| <= bound max|exact|; a tensor ``bound`` holds for each element."""
    assert actual.shape == exact.shape
    actual, exact = actual.detach().cpu().double(), exact.detach()
    assert actual.isfinite().all(), "an element was not written, or is not finite"
    if actual.numel() == 0:
        return
    if not isinstance(bound, Tensor):
        axes = tuple(range(1, exact.dim()))
        bound = bound * exact.abs().amax(dim=axes, keepdim=True)
    error = (actual - exact).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).nan_to_num().max():.3g} times the bound"


class _Recorder(TorchDispatchMode):
    """Notes every call of a registered op of ours, forward and backward, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("ctm_fast"):
            self.calls.append((func, tuple(leaf(a, device=a.device) if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


class Op:
    """Values, hygiene, registration, compilation and messages."""

    op: ClassVar[Callable[..., Any]]
    anchor: ClassVar[str]
    """The argument that gives shape and device to the others."""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    """Where the row has kernels."""
    rounding: ClassVar[float] = 1e-5
    """What Inductor's order of a sum may change."""
    twice: ClassVar[bool] = True
    """Whether the fused kernels are differentiable twice; asking those that are not raises NotImplementedError."""

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """Keyword arguments for an image batch of ``shape``; ``dtype`` is the network's."""
        raise NotImplementedError

    def exact(self, **inputs: Any) -> Any:
        """The paper's formula in the precision of the inputs: a tensor or a tuple of them, as the op returns."""
        raise NotImplementedError

    def bound(self, serving: Serving, dtype: torch.dtype, inputs: Inputs) -> float | Tensor:
        """For :func:`assert_close` of an output stored in ``dtype``."""
        return serving.tolerance(dtype)

    def varieties(self, generator: torch.Generator) -> list[Inputs]:
        """Inputs that differ in what a fake must know: dtypes, memory formats, arguments left out."""
        return [self.inputs((3, 3, 5, 7), torch.float32, generator)]

    def check_values(self, inputs: Inputs, serving: Serving) -> tuple[Tensor, ...]:
        found = outputs(self.op(**on(inputs, serving.device)))
        for actual, exact in zip(found, outputs(self.exact(**upcast(inputs))), strict=True):
            assert_close(actual, exact, self.bound(serving, actual.dtype, inputs))
        return found

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_values(self, serving: Serving, shape: tuple[int, ...], generator: torch.Generator) -> None:
        self.check_values(self.inputs(shape, torch.float32, generator), serving)

    def test_inputs_stay(self, serving: Serving, generator: torch.Generator) -> None:
        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), serving.device)
        before = {name: tensor.clone() for name, tensor in tensors(inputs).items()}
        found = outputs(self.op(**inputs))
        for name, tensor in before.items():
            assert torch.equal(inputs[name], tensor), f"{name} was modified"
            for output in found:
                assert output.untyped_storage().data_ptr() != inputs[name].untyped_storage().data_ptr(), (
                    f"{name} aliased"
                )

    def test_threads(self, generator: torch.Generator, serving: Serving) -> None:
        """Neither the number of threads nor where they divide the work is seen in a result."""
        inputs = on(self.inputs((7, 3, 67, 67), torch.float32, generator), serving.device)
        one = outputs(self.op(**inputs))
        torch.set_num_threads(2)
        assert all(map(torch.equal, one, outputs(self.op(**inputs))))

    def test_opcheck(self, fused: Serving, generator: torch.Generator) -> None:
        """Schema, fake, autograd registration and AOT dispatch of every op that the function and its gradient call."""
        with _Recorder() as recorder:
            for variety in self.varieties(generator):
                inputs = on(variety, fused.device)
                leaves = [tensor for tensor in tensors(inputs).values() if tensor.requires_grad]
                for output in outputs(self.op(**inputs)):
                    if leaves:
                        torch.autograd.grad(output.square().sum(), leaves, create_graph=self.twice)
        assert recorder.calls
        for op, args in recorder.calls:
            if not self.twice and "_backward" in str(op):
                args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
            torch.library.opcheck(op, args)

    @pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
    def test_compile(self, serving: Serving, mode: str, generator: torch.Generator) -> None:
        """One graph, compiled once, serves every batch size, forward and backward."""
        compilations: list[object] = []

        def backend(graph: Any, example: Any) -> Any:
            compilations.append(graph)
            return torch._dynamo.lookup_backend(mode)(graph, example)

        torch._dynamo.reset()
        compiled = torch.compile(self.op, backend=backend, fullgraph=True)
        for batch in (2, 3, 5):
            inputs = self.inputs((batch, 3, 5, 7), torch.float32, generator)
            eager, traced = on(inputs, serving.device), on(inputs, serving.device)
            for tensor in tensors(traced).values():
                if tensor.shape[:1] == (batch,):
                    torch._dynamo.mark_dynamic(tensor, 0)
            for one, other in zip(outputs(self.op(**eager)), outputs(compiled(**traced)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=self.rounding)
                if one.requires_grad:
                    cotangent = randn_like(one, generator)
                    one.backward(cotangent)
                    other.backward(cotangent)
            for name, tensor in tensors(eager).items():
                if tensor.requires_grad:
                    torch.testing.assert_close(tensor.grad, traced[name].grad, rtol=1e-5, atol=self.rounding)
        assert len(compilations) == 1

    def check_error(self, inputs: Inputs, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.op(**inputs)

    def test_messages(self, serving: Serving, generator: torch.Generator) -> None:
        """Each tensor of a wrong type, dtype, shape or device: one error that names it."""
        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), serving.device)
        for name, tensor in tensors(inputs).items():
            self.check_error(inputs | {name: [1.0]}, TypeError, f"^{name}: expected a tensor, got list$")
            self.check_error(
                inputs | {name: tensor.detach().bool()}, TypeError, f"^{name}: expected dtype .*, got bool$"
            )
            self.check_error(inputs | {name: tensor.detach()[None]}, ValueError, f"^{name}: expected shape .*, got ")
            if name != self.anchor:
                self.check_error(
                    inputs | {name: tensor.detach().to("meta")}, ValueError, f"^{name}: expected device .*meta$"
                )

    def test_no_kernel(self, fused: Serving, generator: torch.Generator) -> None:
        """A forced kernel that a device lacks is an error, not a fallback."""
        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), torch.device("meta"))
        self.check_error(inputs, RuntimeError, f"no {fused.backend} kernel for a tensor on meta")


class Images(Op):
    """Memory formats: the output has that of x if x is contiguous or channels_last, else it is contiguous."""

    def varieties(self, generator: torch.Generator) -> list[Inputs]:
        plain = super().varieties(generator)
        return [*plain, channels_last(self.inputs((3, 3, 5, 7), torch.bfloat16, generator))]

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    @pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 3, 40, 40), (5, 4, 16, 16)], ids=str)
    def test_low_precision(
        self, serving: Serving, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        self.check_values(self.inputs(shape, dtype, generator), serving)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_channels_last(self, serving: Serving, dtype: torch.dtype, generator: torch.Generator) -> None:
        inputs = channels_last(self.inputs((2, 3, 33, 37), dtype, generator))
        for output in self.check_values(inputs, serving):
            assert output.is_contiguous(memory_format=torch.channels_last)
            assert not output.is_contiguous()

    @pytest.mark.parametrize("spoil", ["transposed", "strided", "expanded", "mixed"])
    def test_strides(self, serving: Serving, spoil: str, generator: torch.Generator) -> None:
        inputs = on(self.inputs((3, 4, 12, 12), torch.float32, generator), serving.device)
        for name, tensor in tensors(inputs).items():
            if spoil == "strided":
                inputs[name] = torch.stack((tensor, tensor + 1), dim=-1)[..., 0]
            elif tensor.dim() == 4 and spoil == "transposed":
                inputs[name] = tensor.transpose(2, 3)
            elif tensor.dim() == 4 and spoil == "expanded":
                inputs[name] = tensor[:1].expand_as(tensor)
            elif tensor.dim() == 4 and name != "x":  # the other images in the other format
                inputs[name] = tensor.contiguous(memory_format=torch.channels_last)
        for output in self.check_values(inputs, serving):
            assert output.is_contiguous()


class Gradients(Op):
    """Derivatives: in every differentiable input, twice, and an error where a kernel has none."""

    differentiable: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]]

    def sensitive(self, inputs: Inputs) -> list[Tensor]:
        return [inputs[name] for name in self.differentiable]

    def gradient_bound(self, serving: Serving, dtype: torch.dtype) -> float:
        """For :func:`assert_close` of a gradient stored in ``dtype``."""
        return serving.tolerance(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_gradients(
        self, serving: Serving, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        inputs = self.inputs(shape, dtype, generator)
        actual, exact = on(inputs, serving.device), upcast(inputs)
        out, true = self.op(**actual), self.exact(**exact)
        cotangent = randn_like(out, generator)
        found = torch.autograd.grad(out, self.sensitive(actual), cotangent)
        expected = torch.autograd.grad(true, self.sensitive(exact), cotangent.cpu().double())
        for tensor, one, other in zip(self.sensitive(actual), found, expected, strict=True):
            assert one.dtype == tensor.dtype
            assert_close(one, other, self.gradient_bound(serving, one.dtype))

    def test_one_at_a_time(self, serving: Serving, generator: torch.Generator) -> None:
        """The gradient in one input alone, as frozen networks and guidance ask for it."""
        inputs = self.inputs((3, 3, 5, 7), torch.float32, generator)
        for name in self.differentiable:
            alone = {key: v.detach() if isinstance(v, Tensor) else v for key, v in inputs.items()}
            alone[name].requires_grad_()
            actual, exact = on(alone, serving.device), upcast(alone)
            out, true = self.op(**actual), self.exact(**exact)
            cotangent = randn_like(out, generator)
            out.backward(cotangent)
            true.backward(cotangent.cpu().double())
            assert_close(actual[name].grad, exact[name].grad, self.gradient_bound(serving, torch.float32))
            assert all(v.grad is None for key, v in tensors(actual).items() if key != name)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
    def test_gradient_layouts(self, serving: Serving, layout: str, generator: torch.Generator) -> None:
        """A gradient arrives in any layout; expanded, it comes from a sum."""
        inputs = self.inputs((3, 3, 33, 37), torch.float32, generator)
        actual, exact = on(inputs, serving.device), upcast(inputs)
        out, true = self.op(**actual), self.exact(**exact)
        cotangent = randn_like(out, generator)
        if layout == "channels_last":
            cotangent = cotangent.contiguous(memory_format=torch.channels_last)
        elif layout == "expanded":
            cotangent = cotangent[:1, :1, :1, :1].expand_as(out)
        found = torch.autograd.grad(out, self.sensitive(actual), cotangent)
        expected = torch.autograd.grad(true, self.sensitive(exact), cotangent.cpu().double())
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, self.gradient_bound(serving, torch.float32))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_double_backward(self, serving: Serving, dtype: torch.dtype, generator: torch.Generator) -> None:
        """The gradient of a gradient, through a nonlinear function of the output."""
        inputs = self.inputs((3, 3, 5, 7), dtype, generator)
        actual, exact = on(inputs, serving.device), upcast(inputs)
        if not self.twice and serving.backend not in ("reference", "sdpa"):
            with pytest.raises(NotImplementedError, match="no second derivative"):
                torch.autograd.grad(self._penalty(self.op, actual), self.sensitive(actual))
            return
        found, expected = (
            torch.autograd.grad(self._penalty(op, values), self.sensitive(values))
            for op, values in ((self.op, actual), (self.exact, exact))
        )
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 8 * serving.tolerance(dtype))

    def _penalty(self, op: Callable[..., Any], inputs: Inputs) -> Tensor:
        """A function of the gradient of a function of the op."""
        gradients = torch.autograd.grad(op(**inputs).square().sum(), self.sensitive(inputs), create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    def test_constants_raise(self, fused: Serving, generator: torch.Generator) -> None:
        """The gradient in a noise level: an error where a kernel has none, never zero or None."""
        for name in self.constants:
            inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), fused.device)
            inputs[name].requires_grad_()
            self.check_error(inputs, NotImplementedError, "no gradient with respect to noise levels")

    def test_forward_mode_raises(self, fused: Serving, generator: torch.Generator) -> None:
        inputs = on(self.inputs((3, 3, 5, 7), torch.float32, generator), fused.device)
        for name in (*self.differentiable, *self.constants):
            one = inputs[name].detach()

            def call(value: Tensor, name: str = name) -> Tensor:
                return self.op(**inputs | {name: value})

            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.func.jvp(call, (one,), (torch.ones_like(one),))
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call(forward_ad.make_dual(one, torch.ones_like(one)))

    def test_reference_derivatives(self, generator: torch.Generator) -> None:
        """The reference has what the kernels lack: forward mode, and gradients in the levels."""
        inputs = self.inputs((1, 3, 5, 7), torch.float32, generator)
        for name in (*self.differentiable, *self.constants):
            value = inputs[name].detach()
            tangent = randn_like(value, generator)
            with use_reference():
                found = self._derivatives(self.op, inputs, name, value, tangent)
            expected = self._derivatives(self.exact, upcast(inputs), name, value.double(), tangent.double())
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other, 1e-5)

    def _derivatives(
        self, op: Callable[..., Any], inputs: Inputs, name: str, value: Tensor, tangent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of ``op`` in its argument ``name``: forward mode along ``tangent``, reverse mode of the sum."""

        def call(argument: Tensor) -> Tensor:
            result: Tensor = op(**inputs | {name: argument})
            return result

        _, forward = torch.func.jvp(call, (value,), (tangent,))[:2]
        argument = value.clone().requires_grad_()
        (reverse,) = torch.autograd.grad(call(argument).sum(), argument)
        return forward, reverse
