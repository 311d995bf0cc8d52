"""The Triton kernels, compiled for an A100 and an H100 without one: what the interpreter cannot see.

``CALLS`` is a table of calls of the ops at sizes that networks have. Each is made on tensors without memory, with the
launches noted. What would have been launched, with those constants, warps and divisible arguments, is compiled and must

* keep everything in registers: no stack, so no spills and no tables;
* read and write images in vectors of the width that the table gives, each access through each pointer it names;
* leave room for as many warps on a multiprocessor as its author counted on.

``pytest -rP`` prints the registers. A new row adds its calls to the table; ``test_every_kernel`` misses those left out.
"""

import importlib
import importlib.util
import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.ops._library import INTERPRETED

if INTERPRETED or importlib.util.find_spec("triton") is None:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler, or triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import ctm_fast.ops.triton

ROOT = Path(__file__).parent.parent
ROWS = sorted(path.stem for path in Path(ctm_fast.ops.triton.__path__[0]).glob("*.py") if path.stem != "__init__")
MODULES = {row: importlib.import_module(f"ctm_fast.ops.triton.{row}") for row in ROWS}

ELSEWHERE = {"attention": "tests/test_triton_attention_compiles.py"}
"""Rows that are not in the table, and the file that compiles their kernels."""

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
CAPABILITIES = (80, 90)
REGISTERS, MOST_WARPS, MOST_BLOCKS = 65536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024}
"""Of a multiprocessor."""


@dataclass(frozen=True)
class Expected:
    """Of one kernel: bytes of each access through each of these pointers, and warps of a multiprocessor at least."""

    warps: int
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A call of function ``op`` of a row, and what is expected of the kernels that it launches, by name."""

    row: str
    op: str
    case: str
    arguments: tuple[Any, ...]
    kernels: dict[str, Expected]


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments by name: the types of those that it is given, and the constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...]
    warps: int


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def seeds(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.int64, device="meta")


def vectors(**names: int) -> dict[str, int]:
    return names


def precond(dtype: torch.dtype) -> Iterator[Call]:
    x, F_x, t = image(512, 3, 64, 64, dtype=torch.float32), image(512, 3, 64, 64, dtype=dtype), floats(512)
    case = str(dtype)
    combine = Expected(32, vectors(x=16, F_x=16, out=16))
    yield Call("precond_combine", "precond_combine", case, (x, F_x, t, t, 0.5), {"_forward": combine})
    for need_x, need_F in ((True, True), (True, False), (False, True)):
        wide = {"grad": 16} | ({"grad_x": 16} if need_x else {}) | ({"grad_F": 16} if need_F else {})
        arguments = (x, t, t, 0.5, dtype, need_x, need_F)
        case = f"{dtype} {need_x} {need_F}"
        yield Call("precond_combine", "precond_combine_backward", case, arguments, {"_backward": Expected(32, wide)})
    yield Call(
        "precond_input", "precond_input", case, (x, t, 0.5, dtype), {"_scale": Expected(32, vectors(x=16, out=16))}
    )


def noise() -> Iterator[Call]:
    for channels_last in (False, True):
        case = "channels_last" if channels_last else "contiguous"
        # A Philox block is four neighbours in the order (C, H, W): in channels_last a warp writes lines by words.
        width, warps = (4, 20) if channels_last else (16, 32)
        arguments = (seeds(512), 7, (3, 64, 64), 1, channels_last)
        yield Call("philox_normal", "philox_normal", case, arguments, {"_normal": Expected(warps, {"out": width})})
        x, F_x = (image(512, 3, 64, 64, dtype=d, channels_last=channels_last) for d in (torch.float32, torch.bfloat16))
        wide = vectors(x=width, F_x=width // 2, out=width)
        arguments = (x, F_x, floats(512), floats(512), floats(512), seeds(512), 7, 1, 0.5)
        yield Call("gamma_step", "gamma_step", case, arguments, {"_forward": Expected(warps, wide)})
    words = {"_words": Expected(32, {"out": 16})}
    yield Call("philox_normal", "philox_words", "", (seeds(512), 7, (3, 64, 64), 1), words)
    for case, s in (("t", None), ("t and s", floats(512))):
        arguments = (floats(512), s, floats(128), 1.0, True)
        yield Call("noise_embed", "noise_embed", case, arguments, {"_embed": Expected(32)})


def group_norm(
    x: Tensor,
    groups: int,
    forward: dict[str, int],
    backward: dict[str, int],
    *,
    bare: bool = False,
    odd: bool = False,
) -> Iterator[Call]:
    """The two passes, with the warps of each kernel.

    ``bare``: only what a DDPM++ block asks for; ``odd``: not of whole vectors.
    """
    batch, channels = x.shape[:2]
    layout = "contiguous" if x.is_contiguous() else "channels_last"
    case = f"{'x'.join(map(str, x.shape))} {groups} {x.dtype} {layout}{' bare' * bare}"
    weight, shift, modulation = (floats(channels),) * 2, floats(batch, channels), (floats(batch, channels),) * 2
    residual = None if bare else x
    if bare:
        modulation = (None, None)
    images = ("x", "out") if bare else ("x", "residual", "out")
    kernels = expected(forward, odd, _whole=images, _moments=("x",), _apply=images)
    arguments = (x, *weight, groups, 1e-6, shift, *modulation, True, residual, 0.7)
    yield Call("group_norm_silu", "group_norm_silu", case, arguments, kernels)
    kernels = expected(backward, odd, _whole=("x", "grad", "dx"), _sums=("x", "grad"), _dx=("x", "grad", "dx"))
    statistics = (floats(batch, groups),) * 2
    arguments = (x, x, *statistics, *weight, groups, shift, *modulation, True, 0.7, True)
    yield Call("group_norm_silu", "group_norm_silu_backward", case, arguments, kernels)


def expected(warps: dict[str, int], odd: bool, **images: tuple[str, ...]) -> dict[str, Expected]:
    """Of each kernel in ``warps``: those, and whole vectors through its pointers to images unless they are ``odd``."""
    return {
        kernel: Expected(least, {} if odd else dict.fromkeys(images.get(kernel, ()), 16))
        for kernel, least in warps.items()
    }


def group_norms() -> Iterator[Call]:
    one, one_backward = {"_whole": 16}, {"_whole": 8}
    split, split_backward = {"_moments": 32, "_statistics": 16, "_apply": 28}, {"_sums": 16, "_merge": 12, "_dx": 16}
    for bare in (False, True):
        yield from group_norm(image(512, 256, 32, 32), 32, one, {"_whole": 16}, bare=bare)
        yield from group_norm(image(512, 192, 64, 64), 32, split, split_backward, bare=bare)
    yield from group_norm(image(512, 256, 16, 16), 32, one, one_backward)
    yield from group_norm(image(512, 192, 16, 16), 32, one, one_backward)
    yield from group_norm(image(512, 512, 8, 8), 32, one, one_backward)
    yield from group_norm(image(512, 960, 8, 8), 32, one, one_backward)
    yield from group_norm(image(512, 576, 16, 16), 32, split, split_backward)
    yield from group_norm(image(512, 1344, 8, 8), 32, split, split_backward)
    yield from group_norm(image(512, 256, 32, 32, channels_last=False), 32, one, one_backward)
    yield from group_norm(image(512, 192, 64, 64, channels_last=False), 32, split, split_backward)
    yield from group_norm(image(64, 256, 32, 32, dtype=torch.float32), 32, one, one_backward)
    yield from group_norm(image(64, 192, 64, 64, dtype=torch.float32), 32, split, split_backward)
    yield from group_norm(image(64, 192, 64, 64, dtype=torch.float32, channels_last=False), 32, split, split_backward)
    # Sizes that no vector divides, and those that are 1, which the compiler is given as constants.
    any_warps = {"_moments": 8, "_statistics": 8, "_apply": 8}, {"_sums": 8, "_merge": 8, "_dx": 8}
    yield from group_norm(image(3, 21, 97, 97, dtype=torch.float16), 7, *any_warps, odd=True)
    yield from group_norm(image(1, 1, 131, 131), 1, *any_warps, odd=True)
    yield from group_norm(image(1, 1, 1, 1), 1, {"_whole": 8}, {"_whole": 8}, odd=True)
    yield from group_norm(image(1, 7, 5, 3, dtype=torch.float32), 7, {"_whole": 8}, {"_whole": 8}, odd=True)


CALLS = [*precond(torch.float32), *precond(torch.bfloat16), *noise(), *group_norms()]


def name(call: Call) -> str:
    return f"{call.op}-{call.case}"


def launches(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the call launches, noted instead."""
    found: list[Launch] = []

    def wrap_triton(kernel: JITFunction[Any]) -> dict[object, Callable[..., None]]:
        class Grid(dict[object, Callable[..., None]]):
            def __missing__(self, grid: object) -> Callable[..., None]:
                assert isinstance(grid, tuple) and all(isinstance(n, int) and n > 0 for n in grid)
                return lambda *values, **named: found.append(launch(kernel, values, named))

        return Grid()

    for module in MODULES.values():
        if hasattr(module, "wrap_triton"):
            monkeypatch.setattr(module, "wrap_triton", wrap_triton)
    getattr(MODULES[call.row], call.op)(*call.arguments)
    return found


def launch(kernel: Any, values: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """As Triton's launcher specialises: on None, on the integer 1, and on pointers and integers divisible by 16."""
    warps = named.pop("num_warps", 4)
    arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
    assert arguments.keys() == set(kernel.arg_names)
    types, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = TYPES[value.dtype]
            divisible.append(parameter.name)
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                divisible.append(parameter.name)
    return Launch(kernel, types, constants, tuple(divisible), warps)


def compiled(launch: Launch, capability: int) -> Any:
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        {name: launch.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": launch.warps})


def accesses(ptx: str, pointers: list[str]) -> dict[str, set[int]]:
    """Bytes of the accesses to global memory through each pointer, followed through the registers."""
    origin: dict[str, str] = {}
    found: dict[str, set[int]] = {}
    for line in ptx.splitlines():
        if match := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            if int(match[2]) < len(pointers):
                origin[match[1]] = pointers[int(match[2])]
        elif match := re.search(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\s.*\[\s*(%rd\d+)", line):
            found.setdefault(origin[match[3]], set()).add(int(match[1] or 1) * int(match[2]) // 8)
        elif match := re.search(r"\s(%rd\d+), (.*);", line):
            for register in re.findall(r"%rd\d+", match[2]):
                if register in origin:
                    origin[match[1]] = origin[register]
    return found


def resources(kernel: Any, directory: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of a thread, SHARED of a block, as the assembler wrote them down."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found | {"SHARED": found["SHARED"] + kernel.metadata.shared}


def resident(used: dict[str, int], warps: int, capability: int) -> int:
    """Warps of a kernel that fit on a multiprocessor at once."""
    registers = -(-used["REG"] // 8) * 8 * 32 * warps
    blocks = min(REGISTERS // registers, MOST_WARPS // warps, MOST_BLOCKS, SHARED[capability] // max(used["SHARED"], 1))
    return blocks * warps


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("call", CALLS, ids=name)
def test_kernels(call: Call, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = launches(call, monkeypatch)
    assert [launch.kernel.__name__ for launch in found] == list(call.kernels)
    for launch in found:
        kernel_name = launch.kernel.__name__
        expected = call.kernels[kernel_name]
        kernel = compiled(launch, capability)
        used = resources(kernel, tmp_path)
        warps = resident(used, launch.warps, capability)
        print(f"sm_{capability} {call.op} {call.case} {kernel_name}: {used}, {warps} warps resident")
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel_name} spills"
        assert warps >= expected.warps, f"{kernel_name}: {used['REG']} registers leave room for {warps} warps"
        pointers = [name for name in launch.kernel.arg_names if name in launch.types]
        widths = accesses(kernel.asm["ptx"], pointers)
        assert {name: widths[name] for name in expected.bytes} == {n: {b} for n, b in expected.bytes.items()}


def test_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has a call of every kernel that a row launches."""
    tried = {launch.kernel.fn for call in CALLS for launch in launches(call, monkeypatch)}
    missing = [
        f"{row}.{name}"
        for row in MODULES.keys() - ELSEWHERE.keys()
        for name in re.findall(r"wrap_triton\((_\w+)\)\[", inspect.getsource(MODULES[row]))
        if getattr(MODULES[row], name).fn not in tried
    ]
    assert not missing
    assert all((ROOT / ELSEWHERE[row]).exists() for row in MODULES.keys() & ELSEWHERE.keys())


@pytest.mark.parametrize("ones", [("step",), ("stream",), ("step", "stream", "channels", "pixels")])
@pytest.mark.parametrize("call", [call for call in CALLS if call.op in ("philox_normal", "gamma_step")], ids=name)
def test_ones(call: Call, ones: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An integer that is 1 reaches a kernel as a constant, whatever the kernel asks for, if Inductor launches it."""
    (found,) = launches(call, monkeypatch)
    types = {name: kind for name, kind in found.types.items() if name not in ones}
    constants = {**found.constants, **dict.fromkeys(ones, 1)}
    divisible = tuple(name for name in found.divisible if name not in ones)
    assert compiled(replace(found, types=types, constants=constants, divisible=divisible), 90)


def test_combination_divides_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump from t to t is the identity to the bit only if t / t is 1, which an approximate division does not give."""
    (call,) = (call for call in precond(torch.float32) if call.op == "precond_combine")
    (found,) = launches(call, monkeypatch)
    assert compiled(found, 90).asm["ptx"].count("div.rn.f32") >= 2


def test_angle_of_noise_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The angle 2 pi u is a float32 by definition; multiplied within a fused multiply-add it would have more digits."""
    for call in (call for call in CALLS if call.op in ("philox_normal", "gamma_step")):
        (found,) = launches(call, monkeypatch)
        code = compiled(found, 90).asm["ptx"]
        products = re.findall(r"mul(?:\.rn)?\.f32\s+(%r\d+), %r\d+, 0f40C90FDB;", code)
        assert products
        for product in products:
            (use,) = re.findall(rf"(\S+)\s+%r\d+, .*{product}\b", code)
            assert use == "min.f32"
