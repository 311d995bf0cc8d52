"""The .safetensors format, written a tensor at a time: saving takes the memory of one tensor, not of all once more."""

import json
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the format calls a dtype -> the dtype."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``, on any device and of any strides, and ``metadata`` to ``file``.

    Raises KeyError naming a dtype that is not in :data:`DTYPES`.
    """
    # As safetensors itself orders them, so that each lies at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        elements = tensors[name].detach().cpu().contiguous().flatten()
        file.write(elements.view(torch.uint8).numpy().data)
