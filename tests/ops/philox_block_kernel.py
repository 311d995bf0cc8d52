"""A Triton kernel around ``philox_block``, to ask for one block of any index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton import philox_normal


@triton.jit
def _kernel(out, seed, step, stream, block):  # type: ignore[no-untyped-def]
    words = philox_normal.philox_block(seed, step, stream, tl.zeros([1], tl.int64) + block)
    for lane in tl.static_range(4):
        tl.store(out + lane + tl.arange(0, 1), words[lane].to(tl.int64))


def philox_block(seed: int, step: int, stream: int, block: int) -> Tensor:
    """The four words of a block, [4] int64."""
    out = torch.empty(4, dtype=torch.int64)
    _kernel[(1,)](out, seed, step, stream, block)
    return out
