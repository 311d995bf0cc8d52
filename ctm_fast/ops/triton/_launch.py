"""What the Triton rows share: the block size, and the launch that torch.compile can see through."""

from typing import Any

import torch

from ctm_fast.ops._library import INTERPRETED

BLOCK = 1024
"""Elements a program handles: eight to each thread of four warps, two 128-bit loads of float32 each."""


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``, which knows compiled kernels only; an interpreted one is launched as it is."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)
