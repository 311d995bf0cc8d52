"""The tiles of attention's Triton kernels, compiled for A100 and H100 without either: needs and choice."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ctm_fast.ops._library import INTERPRETED

if INTERPRETED or importlib.util.find_spec("triton") is None:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler, or triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctm_fast.ops.triton import attention
from ctm_fast.ops.triton.attention import BACKWARD_KV, BACKWARD_Q, FORWARD, Tile, passes, tiles_for

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program can have, by compute capability."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

KERNELS = {
    "forward": (attention._forward, FORWARD),
    "backward_q": (attention._backward_q, BACKWARD_Q),
    "backward_kv": (attention._backward_kv, BACKWARD_KV),
}


class Case(NamedTuple):
    """A kernel as a call would have it compiled."""

    kernel: str
    head: int
    itemsize: int
    tile: Tile
    capability: int
    parts: tuple[bool, bool] | None = None
    precision: str = "ieee"
    tokens: int = 1024

    def __str__(self) -> str:
        tile = "-".join(map(str, self.tile[:4]))
        parts = "" if self.parts is None else "-d" + "k" * self.parts[0] + "v" * self.parts[1]
        return f"{self.kernel}{parts}-{self.head}-{self.itemsize}-{self.precision}-{tile}-sm{self.capability}"

    def owned(self) -> int:
        """Rows that a program writes."""
        return self.tile.keys if self.kernel == "backward_kv" else self.tile.queries

    def compile(self) -> Any:
        kernel = KERNELS[self.kernel][0].fn
        kind = {2: "*bf16", 4: "*fp32"}[self.itemsize]
        types = dict.fromkeys(("qkv", "out", "grad", "d_qkv"), kind)
        types |= {"lse": "*fp32", "delta": "*fp32", "heads": "i32"}
        constants: dict[str, Any] = {"N": self.tokens, "D": self.head, "PRECISION": self.precision}
        constants["BLOCK_D"] = max(16, triton.next_power_of_2(self.head))
        constants |= self.tile.config().kwargs
        if self.parts is not None:
            constants |= dict(zip(("KEYS", "VALUES"), self.parts, strict=True))
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if "*" in types.get(name, "")},
        )
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        return triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)


def cases() -> Iterator[Case]:
    """Each tile on each architecture that may choose it; the first of a kernel and head size comes first."""
    for name, (_, tiles) in KERNELS.items():
        for (head, itemsize), choice in tiles.items():
            for tile in choice:
                for capability in (90, 80) if tile.since <= 8 else (90,):
                    for parts in passes(head) if name == "backward_kv" else [None]:
                        for precision in ("ieee",) if itemsize == 2 else ("ieee", "tf32"):
                            yield Case(name, head, itemsize, tile, capability, parts, precision)


def short(case: Case) -> bool:
    """The tile tried first on an H100 in bfloat16, of each kernel and head size; float32 of one head size."""
    first = case.tile == KERNELS[case.kernel][1][case.head, case.itemsize][0]
    return first and case.capability == 90 and (case.itemsize == 2 or case.head == 64)


def resources(compiled: Any, path: Path) -> dict[str, int]:
    """REG, STACK, LOCAL as cuobjdump finds them in the machine code."""
    path.write_bytes(compiled.asm["cubin"])
    found = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if short(case) else pytest.mark.long) for case in cases()]
)
def test_tile(case: Case, tmp_path: Path) -> None:
    """No register is spilled, shared memory suffices, products are the tensor cores', and memory is read in vectors."""
    compiled = case.compile()
    found = resources(compiled, tmp_path / "cubin")
    print(case, found, compiled.metadata.shared)
    assert found["STACK"] == found["LOCAL"] == 0
    assert found["REG"] <= min(255, 65536 // (32 * case.tile.warps))
    assert compiled.metadata.shared <= SHARED[case.capability]
    ptx = compiled.asm["ptx"]
    if case.precision == "ieee" and case.itemsize == 4:
        assert not any(name in ptx for name in TENSOR_CORES.values())
    elif case.itemsize == 4:
        assert any(name in ptx for name in TENSOR_CORES.values())
    else:
        assert TENSOR_CORES[case.capability] in ptx
        assert case.owned() >= 16 * case.tile.warps, "warps would repeat each other's products"
    # 16-bit elements one by one: no tile is. (lse and delta are 32-bit vectors, one to a thread.)
    assert not re.search(r"(ld|st)\.global(\.\w+)*\.[bu]16\b", ptx)
    assert re.search(r"ld\.global(\.\w+)*\.v4", ptx) or "cp.async.cg" in ptx
    assert re.search(r"st\.global(\.\w+)*\.v4", ptx)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head", "tokens"), [(24, 65), (64, 1), (100, 77)])
def test_odd_sizes_compile(head: int, tokens: int, capability: int) -> None:
    for name, (_, tiles) in KERNELS.items():
        tile = tiles_for(tiles, tokens, head, 2, capability // 10)[0]
        for parts in passes(head) if name == "backward_kv" else [None]:
            assert Case(name, head, 2, tile, capability, parts, tokens=tokens).compile().asm["cubin"]


@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 256, 1024, 4096])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("name", KERNELS)
def test_choice(name: str, itemsize: int, tokens: int, capability: int) -> None:
    """There is always a tile, one that suits the device, and larger than the image only if none is not."""
    tiles = KERNELS[name][1]
    for head in (1, 8, 24, 32, 33, 64, 100, 128, 200, 256):
        found = tiles_for(tiles, tokens, head, itemsize, capability)
        known = tiles[next(size for size in (32, 64, 128, 256) if size >= head), itemsize]
        assert found
        assert set(found) <= set(known)
        assert all(tile.since <= capability for tile in found)
        sizes = [max(tile.queries, tile.keys) for tile in found]
        assert len(found) == 1 or max(sizes) < 2 * tokens


def pruned(name: str, tokens: int, head: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    kernel, _ = KERNELS[name]
    named = {"qkv": torch.empty(0, dtype=dtype)}
    kept = kernel.early_config_prune(kernel.configs, named, N=tokens, D=head, PRECISION="ieee")
    return [(*config.kwargs.values(), config.num_warps, config.num_stages) for config in kept]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name", KERNELS)
def test_tuner(name: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner times the tiles that are meant for the call, and no others; nothing is timed at import."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel, tiles = KERNELS[name]
    assert set(kernel.keys) <= set(kernel.arg_names)
    assert kernel.cache_results
    assert not kernel.cache
    for head, itemsize in tiles:
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        for tokens in (64, 1024):
            expected = [tile[:4] for tile in tiles_for(tiles, tokens, head, itemsize, capability[0])]
            assert sorted(pruned(name, tokens, head, dtype)) == sorted(expected)


@pytest.mark.parametrize(("head", "launches"), [(64, 2), (256, 3)])
def test_traced(head: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.compile`` traces the op for a GPU: launches with a grid for each tile, and nothing else computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def both(qkv: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        out, lse = attention.attention(qkv, 2)
        return attention.attention_backward(grad, qkv, out, lse, 2)

    with FakeTensorMode():
        shape = (3, 6 * head, 16, 16)
        qkv = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        grad = torch.empty((3, 2 * head, 16, 16), dtype=torch.bfloat16, device="cuda")
        graph = make_fx(both, tracing_mode="fake")(qkv, grad).graph
    calls = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(calls) == 1 + launches
    for node, name in zip(calls, ("forward", "backward_q", "backward_kv", "backward_kv"), strict=False):
        tiles = tiles_for(KERNELS[name][1], 256, head, 2, 9)
        assert len(node.kwargs["grid"]) == len(tiles)
        owned = sorted(Case(name, head, 2, tile, 90).owned() for tile in tiles)
        assert sorted(grid[0] for grid in node.kwargs["grid"]) == sorted(6 * (256 // rows) for rows in owned)
    others = {str(node.target) for node in graph.nodes if node.op == "call_function"} - {str(calls[0].target)}
    assert all(re.match(r"aten\.(empty|new_empty|empty_like|permute)", name) for name in others), others


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_precision(setting: str, expected: str) -> None:
    """float32 products are as exact as PyTorch's own are asked to be at the time of the call."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert attention._constants(torch.empty(1, 96, 2, 2), 1)["PRECISION"] == expected
        assert attention._constants(torch.empty(1, 96, 2, 2, dtype=torch.bfloat16), 1)["PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
