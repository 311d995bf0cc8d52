"""What networks compute in, by name."""

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    return _DTYPES[precision]
