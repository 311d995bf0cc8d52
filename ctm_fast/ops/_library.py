"""How an op is registered, and which of its kernels serves a call.

An op has up to four kernels of the same signature:

``reference``
    plain PyTorch (``ops/reference/<row>.py``), on every device; ``torch.compile`` sees through it.
``cpp``
    the C++ / CUDA C++ kernel behind the dispatcher, ``torch.ops.ctm_fast.<op>``; opaque to ``torch.compile``.
``triton``
    the Triton kernel (``ops/triton/<row>.py``), ``torch.ops.ctm_fast_triton.<op>``, a ``torch.library.triton_op``:
    ``torch.compile`` and AOTInductor see the kernel (on a GPU, where this has not run yet).

``sdpa``
    PyTorch's own fused kernels, for attention alone; ``torch.compile`` and autograd know them.

``SERVES`` says which of them is the default, eagerly and inside a compiled network; it follows the measurements in
``benchmarks/results``. A kernel that is not there (no compiler, no Triton) yields to the next in the list;
``python -m ctm_fast.report`` tells which one that is and why.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ctm_fast import _libraries

Backend = Literal["reference", "cpp", "triton", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpp", "triton", "sdpa")
DEVICES = ("cpu", "cuda")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs on the CPU, kernel by kernel, in NumPy: for tests."""

# (device, inside torch.compile) -> op -> the kernels to use, best first. Not listed: the reference. An entry for one
# size, "attention 256x64" (pixels x channels of a head), comes before that of the op.
# cpu: measured (benchmarks/bench_defaults.py holds the table to it). precond_input is one multiplication to eager
# PyTorch; compiled, Inductor fuses it with the change of memory format behind it into a loop slower than the two.
# cuda: not measured yet, so that a compiled network keeps the reference, which Inductor fuses, except where the
# reference spends tens of integer operations on each random word.
_FUSED: tuple[Backend, ...] = ("cpp", "triton")
# Winograd's convolution needs vectors of 8: with 4 it takes twice as long as PyTorch's.
_CONV: tuple[Backend, ...] = ("cpp",) if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ()
_CONV3X3: dict[str, tuple[Backend, ...]] = {
    **dict.fromkeys(("conv3x3", "conv3x3_pack", "conv3x3_packed", "conv3x3_weight_grad"), _CONV),
    "conv3x3 few tiles": (),
}
_SDPA: dict[str, tuple[Backend, ...]] = {"attention": ("sdpa",)}
SERVES: dict[tuple[str, bool], dict[str, tuple[Backend, ...]]] = {
    ("cpu", False): dict.fromkeys(
        ("precond_combine", "noise_embed", "philox_words", "philox_normal", "gamma_step", "group_norm_silu"), _FUSED
    )
    | _CONV3X3
    | _SDPA,
    ("cpu", True): dict.fromkeys(
        ("precond_input", "philox_words", "philox_normal", "gamma_step", "group_norm_silu"), _FUSED
    )
    | _CONV3X3
    | _SDPA,
    ("cuda", False): dict.fromkeys(
        (
            *("precond_input", "precond_combine", "noise_embed"),
            *("philox_words", "philox_normal", "gamma_step", "group_norm_silu"),
        ),
        _FUSED,
    )
    | _SDPA,
    ("cuda", True): dict.fromkeys(("philox_words", "philox_normal", "gamma_step"), _FUSED) | _SDPA,
}

_kernels: dict[str, dict[Backend, Callable[..., Any]]] = {}
_cells: dict[str, tuple[Backend, ...]] = {}
_derived: dict[str, tuple[Callable[..., Any], Callable[..., None] | None, Callable[..., Any] | None]] = {}
_default: dict[tuple[str, str, bool], Backend] = {}
_forced: Backend | None = "reference" if os.environ.get("CTM_FAST_REFERENCE") == "1" else None


def unavailable(backend: Backend, device: str) -> str | None:
    """Why ``backend`` has no kernels for ``device`` here, in words; None where it has."""
    if backend == "cpp":
        return _libraries.missing(device)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if INTERPRETED:
            return None if device == "cpu" else "TRITON_INTERPRET=1 moves Triton to the CPU"
        if device == "cpu":
            return "Triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)"
        if device != "cuda":
            return f"there are no Triton kernels for {device}"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
    if backend == "sdpa" and device not in DEVICES:
        return f"not used on {device}"
    return None


def define(
    row: str,
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cells: tuple[Backend, ...] = ("reference", "cpp", "triton"),
    sdpa: Callable[..., Any] | None = None,
) -> None:
    """Register op ``name`` of a row with whichever kernels are there.

    Args:
        row: the stem of the row's files; ``ops/reference/<row>.py`` and ``ops/triton/<row>.py`` have a function
            ``name``.
        fake: the same signature, returns empty tensors of the right shape, dtype and strides.
        setup_context: as for ``torch.library.register_autograd``; None for a gradient that needs nothing saved.
        backward: ``backward(ops, ctx, *grads)``; ``ops`` is the namespace that served the forward pass. None for an op
            without a gradient.
        cells: the kernels that the op has by design.
        sdpa: the kernel of that name, differentiable as it is.
    """
    kernels: dict[Backend, Callable[..., Any]] = {
        "reference": getattr(importlib.import_module(f"ctm_fast.ops.reference.{row}"), name)
    }
    if sdpa is not None:
        kernels["sdpa"] = sdpa
    _derived[name] = (fake, setup_context, backward)
    if "cpp" in cells and any(unavailable("cpp", device) is None for device in DEVICES):
        kernels["cpp"] = derive("ctm_fast", name)
    if "triton" in cells and any(unavailable("triton", device) is None for device in DEVICES):
        function = getattr(importlib.import_module(f"ctm_fast.ops.triton.{row}"), name)
        if INTERPRETED:
            torch.library.custom_op(f"ctm_fast_triton::{name}", function, mutates_args=())
        else:
            torch.library.triton_op(f"ctm_fast_triton::{name}", function, mutates_args=())
        kernels["triton"] = derive("ctm_fast_triton", name)
    _kernels[name] = kernels
    _cells[name] = cells
    _choose(name)


def _choose(name: str) -> None:
    """The defaults of op ``name``, and of each of its sizes that has an entry: once, not at each call."""
    for (device, compiling), table in SERVES.items():
        for entry in (name, *(entry for entry in table if entry.startswith(f"{name} "))):
            _default[entry, device, compiling] = _best(name, device, table.get(entry, ()))


def no_second_derivative(op: str) -> Callable[..., Any]:
    """The ``backward`` of a kernel that is a gradient already, and whose own nobody has written: it says so."""

    def backward(ops: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{op}: the fused kernels have no second derivative; run it under ctm_fast.ops.use_reference()"
        )

    return backward


def derive(namespace: str, name: str) -> Callable[..., Any]:
    """The op ``name`` of ``namespace``, where a kernel of it is registered, with fake and gradient registered too."""
    fake, setup_context, backward = _derived[name]
    ops = getattr(torch.ops, namespace)
    torch.library.register_fake(f"{namespace}::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"{namespace}::{name}", _bind(backward, ops), setup_context=setup_context)
    return getattr(ops, name)


def _bind(backward: Callable[..., Any], ops: Any) -> Callable[..., Any]:
    return lambda ctx, *grads: backward(ops, ctx, *grads)


def _best(name: str, device: str, backends: tuple[Backend, ...]) -> Backend:
    if INTERPRETED and device == "cpu" and "triton" in _kernels[name]:
        return "triton"
    return next((backend for backend in backends if unavailable(backend, device) is None), "reference")


def serving(name: str, device: str, *, compiling: bool = False, case: str | None = None) -> Backend:
    """Which kernel serves op ``name`` on ``device`` ("cpu", "cuda", ...), eagerly or inside ``torch.compile``.

    ``case`` is the size of a call, as the table writes it, for an op whose kernels depend on it.
    """
    if _forced is not None and _forced in _cells[name]:
        return _forced
    general = _default.get((name, device, compiling), "reference")
    return general if case is None else _default.get((f"{name} {case}", device, compiling), general)


def kernel(
    name: str, x: Tensor, *inputs: Tensor | None, constants: tuple[Tensor, ...] = (), case: str | None = None
) -> Callable[..., Any]:
    """The kernel of op ``name`` that serves a call on ``x``'s device, of the size ``case`` where it matters.

    A fused kernel has no forward-mode derivative and none with respect to ``constants`` (noise levels): asking for
    one raises NotImplementedError here, because the dispatcher would return zeros.
    """
    backend = serving(name, x.device.type, compiling=torch.compiler.is_compiling(), case=case)
    if backend in ("reference", "sdpa"):
        return _kernels[name][backend]
    for tensor in (x, *inputs, *constants):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: the {backend} kernel has no forward-mode derivative; "
                "run it under ctm_fast.ops.use_reference()"
            )
    for tensor in constants:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name}: the {backend} kernel has no gradient with respect to noise levels; "
                "run it under ctm_fast.ops.use_reference()"
            )
    if unavailable(backend, x.device.type) is not None:
        raise RuntimeError(
            f"{name}: no {backend} kernel for a tensor on {x.device}: {unavailable(backend, x.device.type)}"
        )
    return _kernels[name][backend]


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Have ``backend`` serve, in the whole process, every op that has such a kernel by design.

    For tests and benchmarks. An op whose kernel is not there for the device raises RuntimeError when called.
    Raises ValueError for a name that is not one of ``BACKENDS``.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def use_reference() -> contextlib.AbstractContextManager[None]:
    """Have plain PyTorch serve every op, in the whole process, while the context is open.

    ``CTM_FAST_REFERENCE=1`` does the same for a whole run. The reference is differentiable in every way that PyTorch
    is (forward mode, twice, in the noise levels), and ``torch.compile`` fuses it.
    """
    return use_backend("reference")
