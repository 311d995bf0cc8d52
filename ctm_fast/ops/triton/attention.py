"""Softmax attention in Triton, after FlashAttention-2 (Dao, arXiv 2307.08691): no score leaves the chip.

q, k and v are read where the convolution left them, [B, N, 3, heads, D], and the results are written in the same order.
A program owns its rows of what it writes, so that nothing is added up across programs: the same bits every time.
Scores are kept in powers of two, exp(x) = exp2(x log2 e), because that is what the hardware computes.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops._library import INTERPRETED
from ctm_fast.ops.triton._launch import wrap_triton

LARGEST_HEAD = 256
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys at a time, warps of a program, stages of its loop's pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int
    since: int = 8
    """The first compute capability (A100: 8, H100: 9) where it fits the shared memory and spills no register."""

    def config(self) -> Any:
        blocks = {"BLOCK_M": self.queries, "BLOCK_N": self.keys}
        return triton.Config(blocks, num_warps=self.warps, num_stages=self.stages)


Tiles = dict[tuple[int, int], list[Tile]]
"""(head dim as padded, bytes of an element) -> the tiles to choose among, by time, on the device; the smallest last."""

# Held by tests/test_triton_attention_compiles.py, on either architecture. The rows that a program owns are at least 16
# to a warp in half precision: with fewer, warps do each other's products over again. In float32 without TF32 there are
# no tensor cores, and a product is unrolled in registers: one small tile.
FORWARD: Tiles = {
    (32, 2): [Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)],
    (64, 2): [Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    (128, 2): [Tile(128, 128, 8, 2, since=9), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    (256, 2): [Tile(128, 64, 8, 2, since=9), Tile(128, 32, 8, 3, since=9), Tile(64, 32, 4, 2)],
    (32, 4): [Tile(64, 32, 4, 2)],
    (64, 4): [Tile(32, 32, 4, 2)],
    (128, 4): [Tile(32, 32, 8, 2)],
    (256, 4): [Tile(32, 16, 8, 1)],
}
BACKWARD_Q: Tiles = {
    (32, 2): [Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    (64, 2): [Tile(128, 128, 8, 2, since=9), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    (128, 2): [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)],
    (256, 2): [Tile(128, 32, 8, 2, since=9), Tile(128, 16, 8, 2, since=9), Tile(64, 16, 4, 2)],
    (32, 4): [Tile(64, 32, 4, 2)],
    (64, 4): [Tile(32, 32, 4, 2)],
    (128, 4): [Tile(32, 16, 8, 2)],
    (256, 4): [Tile(16, 16, 8, 2)],
}
BACKWARD_KV: Tiles = {
    (32, 2): [Tile(64, 128, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)],
    (64, 2): [Tile(64, 128, 8, 3), Tile(32, 128, 8, 3), Tile(64, 64, 4, 3)],
    (128, 2): [Tile(32, 128, 8, 3, since=9), Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)],
    (256, 2): [Tile(32, 128, 8, 2, since=9), Tile(16, 64, 4, 2)],
    (32, 4): [Tile(32, 64, 4, 2)],
    (64, 4): [Tile(32, 32, 4, 2)],
    (128, 4): [Tile(16, 32, 8, 2)],
    (256, 4): [Tile(16, 16, 8, 1)],
}
_INTERPRETED = Tile(64, 128, 4, 1)


def tiles_for(tiles: Tiles, tokens: int, head: int, itemsize: int, capability: int) -> list[Tile]:
    """Those for a head of ``head`` channels on a device, without blocks that are half empty or worse, but for one."""
    found = [tile for tile in tiles[max(32, triton.next_power_of_2(head)), itemsize] if tile.since <= capability]
    return [tile for tile in found if max(tile.queries, tile.keys) < 2 * tokens] or found[-1:]


def _tuned(tiles: Tiles, *more: str) -> Any:
    """``triton.autotune`` over ``tiles``, at the first call of each size; the choice is kept in Triton's cache on disk.

    A first call times kernels, which a CUDA graph cannot record: call once before capturing.
    """

    def prune(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
        given = {**named, **constants}
        qkv = given["qkv"]
        capability, _ = torch.cuda.get_device_capability(qkv.device)
        chosen = tiles_for(tiles, given["N"], given["D"], qkv.dtype.itemsize, capability)
        wanted = [tile.config().all_kwargs() for tile in chosen]
        return [config for config in configs if config.all_kwargs() in wanted]

    every = {(*tile[:4],): tile.config() for choice in tiles.values() for tile in choice}
    return triton.autotune(
        [_INTERPRETED.config()] if INTERPRETED else list(every.values()),
        key=["N", "D", "PRECISION", *more],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )


def passes(head: int) -> list[tuple[bool, bool]]:
    """(dk, dv) of each pass over the keys: the sums of both, of a block of 256 channels, exceed the registers."""
    return [(True, True)] if head <= 128 else [(True, False), (False, True)]


@triton.jit
def _place(heads, N: tl.constexpr, BLOCK: tl.constexpr):
    """Image (int64), head, and first row of this program; neighbours share the keys and values that they read."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    index = tl.program_id(0)
    head = index // BLOCKS % heads
    return (index // BLOCKS // heads).to(tl.int64), head, index % BLOCKS * BLOCK


@triton.jit
def _pointers(base, start, row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: to the channels of a head in rows from ``start``, ``row`` elements apart."""
    within = tl.arange(0, BLOCK)[:, None] * row + tl.arange(0, BLOCK_D)[None, :]
    return base + tl.cast(start, tl.int64) * row + within


@triton.jit
def _inside(start, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    return (start + tl.arange(0, BLOCK) < N)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def _load(base, start, row, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D], zero where there is no row or channel; not masked where there is every one."""
    pointers = _pointers(base, start, row, BLOCK, BLOCK_D)
    if N % BLOCK == 0 and D == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=_inside(start, N, D, BLOCK, BLOCK_D), other=0.0)
    return tile


@triton.jit
def _store(base, start, row, tile, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = _pointers(base, start, row, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=_inside(start, N, D, BLOCK, BLOCK_D))


@_tuned(FORWARD)
@triton.jit
def _forward(
    qkv,
    out,
    lse,
    heads,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of queries against all keys, block by block, with the softmax's maximum and denominator carried along."""
    SCALE: tl.constexpr = _LOG2_E * D**-0.5
    image, head, start = _place(heads, N, BLOCK_M)
    channels = heads * D
    q_base = qkv + image * N * 3 * channels + head * D
    k_base, v_base = q_base + channels, q_base + 2 * channels
    q = _load(q_base, start, 3 * channels, N, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        k = _load(k_base, first, 3 * channels, N, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if N % BLOCK_N != 0:
            scores = tl.where((first + tl.arange(0, BLOCK_N) < N)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * SCALE)  # finite: every block has a key
        weights = tl.exp2(scores * SCALE - higher[:, None])
        shrink = tl.exp2(top - higher)
        denominator = denominator * shrink + tl.sum(weights, 1)
        v = _load(v_base, first, 3 * channels, N, D, BLOCK_N, BLOCK_D)
        total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        top = higher
    out_base = out + image * N * channels + head * D
    _store(out_base, start, channels, total / denominator[:, None], N, D, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    lse_base = lse + (image * heads + head) * N
    tl.store(lse_base + rows, (top + tl.log2(denominator)) * _LN_2, mask=rows < N)


@_tuned(BACKWARD_Q)
@triton.jit
def _backward_q(
    grad,
    qkv,
    out,
    lse,
    delta,
    d_qkv,
    heads,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of a block of queries; on the way their delta = sum(grad out), which _backward_kv reads."""
    SCALE: tl.constexpr = D**-0.5
    image, head, start = _place(heads, N, BLOCK_M)
    channels = heads * D
    q_offset = image * N * 3 * channels + head * D
    k_base, v_base = qkv + q_offset + channels, qkv + q_offset + 2 * channels
    o_offset = image * N * channels + head * D
    q = _load(qkv + q_offset, start, 3 * channels, N, D, BLOCK_M, BLOCK_D)
    d_out = _load(grad + o_offset, start, channels, N, D, BLOCK_M, BLOCK_D)
    o = _load(out + o_offset, start, channels, N, D, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    row_offset = (image * heads + head) * N
    d = tl.sum(d_out.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row_offset + rows, d, mask=rows < N)
    log_sum = tl.load(lse + row_offset + rows, mask=rows < N, other=0.0) * _LOG2_E
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        k = _load(k_base, first, 3 * channels, N, D, BLOCK_N, BLOCK_D)
        v = _load(v_base, first, 3 * channels, N, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(scores * (SCALE * _LOG2_E) - log_sum[:, None])
        if N % BLOCK_N != 0:  # k is zero there, but the weight of a missing key can overflow
            weights = tl.where((first + tl.arange(0, BLOCK_N) < N)[None, :], weights, 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - d[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)
    _store(d_qkv + q_offset, start, 3 * channels, d_q * SCALE, N, D, BLOCK_M, BLOCK_D)


@_tuned(BACKWARD_KV, "KEYS", "VALUES")
@triton.jit
def _backward_kv(
    grad,
    qkv,
    lse,
    delta,
    d_qkv,
    heads,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk (if KEYS) and dv (if VALUES) of a block of keys, over all queries; scores are transposed, [keys, queries].

    Rows of keys that are missing may overflow: no other row reads them, and they are not stored.
    """
    SCALE: tl.constexpr = D**-0.5
    image, head, start = _place(heads, N, BLOCK_N)
    channels = heads * D
    q_offset = image * N * 3 * channels + head * D
    k_offset, v_offset = q_offset + channels, q_offset + 2 * channels
    o_offset = image * N * channels + head * D
    row_offset = (image * heads + head) * N
    k = _load(qkv + k_offset, start, 3 * channels, N, D, BLOCK_N, BLOCK_D)
    if KEYS:
        v = _load(qkv + v_offset, start, 3 * channels, N, D, BLOCK_N, BLOCK_D)
        d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if VALUES:
        d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = _load(qkv + q_offset, first, 3 * channels, N, D, BLOCK_M, BLOCK_D)
        d_out = _load(grad + o_offset, first, channels, N, D, BLOCK_M, BLOCK_D)
        # A query that is missing adds nothing: its gradient is zero.
        log_sum = tl.load(lse + row_offset + rows, mask=rows < N, other=0.0) * _LOG2_E
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.exp2(scores * (SCALE * _LOG2_E) - log_sum[None, :])
        if VALUES:
            d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        if KEYS:
            d = tl.load(delta + row_offset + rows, mask=rows < N, other=0.0)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_scores = weights * (d_weights - d[None, :])
            d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    if KEYS:
        _store(d_qkv + k_offset, start, 3 * channels, d_k * SCALE, N, D, BLOCK_N, BLOCK_D)
    if VALUES:
        _store(d_qkv + v_offset, start, 3 * channels, d_v, N, D, BLOCK_N, BLOCK_D)


def _constants(qkv: Tensor, heads: int) -> dict[str, Any]:
    """N is one: a network has few sizes, and where blocks divide it, no load is masked. A symbol becomes its value."""
    _, channels, height, width = qkv.shape
    head = int(channels) // (3 * heads)
    if head > LARGEST_HEAD:
        raise ValueError(f"heads: expected up to {LARGEST_HEAD} channels a head in the Triton kernel, got {head}")
    rounded = qkv.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "N": int(height * width),
        "D": head,
        "BLOCK_D": max(16, triton.next_power_of_2(head)),
        "PRECISION": "tf32" if rounded else "ieee",
    }


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = qkv.shape
    tokens = height * width
    out = qkv.new_empty((batch, height, width, channels // 3)).permute(0, 3, 1, 2)
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    if qkv.numel() == 0:
        return out, lse

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (batch * heads * triton.cdiv(tokens, meta["BLOCK_M"]),)

    wrap_triton(_forward)[grid](qkv, out, lse, heads, **_constants(qkv, heads))
    return out, lse


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    d_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return d_qkv
    batch, _, height, width = qkv.shape
    tokens = height * width
    delta = torch.empty_like(lse)
    constants = _constants(qkv, heads)

    def blocks_of_queries(meta: dict[str, Any]) -> tuple[int]:
        return (batch * heads * triton.cdiv(tokens, meta["BLOCK_M"]),)

    def blocks_of_keys(meta: dict[str, Any]) -> tuple[int]:
        return (batch * heads * triton.cdiv(tokens, meta["BLOCK_N"]),)

    wrap_triton(_backward_q)[blocks_of_queries](grad, qkv, out, lse, delta, d_qkv, heads, **constants)
    for keys, values in passes(constants["D"]):
        wrap_triton(_backward_kv)[blocks_of_keys](
            grad, qkv, lse, delta, d_qkv, heads, **constants, KEYS=keys, VALUES=values
        )
    return d_qkv
