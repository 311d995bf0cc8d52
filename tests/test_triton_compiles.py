"""The Triton kernels, compiled for an H100 without one: what the interpreter cannot see."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest

from ctm_fast.ops._library import INTERPRETED

if INTERPRETED or importlib.util.find_spec("triton") is None:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler, or triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctm_fast.ops.triton import gamma_step, noise_embed, philox_normal, precond_combine, precond_input
from ctm_fast.ops.triton._launch import BLOCK

FLOAT, HALF, LONG, INT, SCALAR = "*fp32", "*bf16", "*i64", "i32", "fp32"
NOISE = {"step": INT, "stream": INT, "channels": INT, "pixels": INT}


def ptx(kernel: Any, types: Mapping[str, str], constants: Mapping[str, object]) -> str:
    """PTX for compute capability 9.0 of ``kernel`` with arguments of ``types``; the others are ``constants``."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ones", [(), ("step",), ("stream",), ("step", "stream", "channels", "pixels")])
def test_noise(ones: tuple[str, ...], channels_last: bool) -> None:
    """An integer that is 1 reaches a kernel as a constant, whatever the kernel asks for, if Inductor launches it."""
    numbers = {name: kind for name, kind in NOISE.items() if name not in ones}
    constants = {**dict.fromkeys(ones, 1), "CHANNELS_LAST": channels_last, "BLOCK": BLOCK}
    assert ptx(philox_normal._normal, {"seeds": LONG, "out": FLOAT, **numbers}, constants)
    images = {"x": FLOAT, "F_x": HALF, "out": FLOAT, "t": FLOAT, "s": FLOAT, "t_next": FLOAT, "seeds": LONG}
    assert ptx(gamma_step._forward, {**images, "sigma_data": SCALAR, **numbers}, constants)


@pytest.mark.parametrize("size", [INT, None])
def test_words(size: str | None) -> None:
    types = {"seeds": LONG, "out": LONG, "step": INT, "stream": INT, **({"size": size} if size else {})}
    assert ptx(philox_normal._words, types, {"BLOCK": BLOCK, **({} if size else {"size": 1})})


def test_combination_divides_exactly() -> None:
    """A jump from t to t is the identity to the bit only if t / t is 1, which an approximate division does not give."""
    images = {"x": FLOAT, "F_x": HALF, "out": FLOAT, "t": FLOAT, "s": FLOAT, "sigma_data": SCALAR, "size": INT}
    code = ptx(precond_combine._forward, images, {"BLOCK": BLOCK})
    assert code.count("div.rn.f32") >= 2
    gradients = {"grad": FLOAT, "t": FLOAT, "s": FLOAT, "grad_x": FLOAT, "grad_F": HALF, "sigma_data": SCALAR}
    assert ptx(precond_combine._backward, {**gradients, "size": INT}, {"NEED_X": True, "NEED_F": True, "BLOCK": BLOCK})


def test_input_and_embedding() -> None:
    types = {"x": FLOAT, "t": FLOAT, "out": HALF, "sigma_data": SCALAR, "size": INT}
    assert ptx(precond_input._scale, types, {"BLOCK": BLOCK})
    levels = {"t": FLOAT, "freqs": FLOAT, "out": FLOAT, "scale": SCALAR, "batch": INT, "half": INT}
    for s in ({"s": FLOAT}, {}):
        constants = {"SIN_FIRST": True, "BLOCK": 128, **({} if s else {"s": None})}
        assert ptx(noise_embed._embed, {**levels, **s}, constants)
