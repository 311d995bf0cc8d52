"""What is written, the safetensors library reads; and it takes no second copy."""

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from ctm_fast.models.safetensors_file import DTYPES, write_safetensors
from tests.memory import peak


def _written(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, tensors, metadata)
    return file.getvalue()


def test_every_dtype(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {name: (torch.randn(3, 5, generator=generator) * 50).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.0), "nothing": torch.zeros(0, 4, dtype=torch.int16)}
    metadata = {"licence": '\u00e9 "quoted" \u4e2d'}
    (tmp_path / "a").write_bytes(_written(tensors, metadata))
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == metadata
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype, name
            assert torch.equal(file.get_tensor(name), tensor), name
    (length,) = struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])
    header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0, f"{name} is not aligned"


def test_strides(generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    tensors = {
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": weight[:, :, 0, 0].t(),
        "parameter": torch.nn.Parameter(weight[::2]),
    }
    for name, tensor in load(_written(tensors, {})).items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_dtype_that_the_format_has_not() -> None:
    with pytest.raises(KeyError, match="complex64"):
        _written({"a": torch.zeros(2, dtype=torch.complex64)}, {})


def test_memory(tmp_path: Path) -> None:
    """Half a GiB of channels_last weights is written in little more than one tensor's memory."""
    before = """
import torch
from ctm_fast.files import atomic_write
from ctm_fast.models.safetensors_file import write_safetensors
tensors = {str(i): torch.ones(2**10, 2**5, 16, 16).to(memory_format=torch.channels_last) for i in range(16)}
"""
    code = """atomic_write("a.safetensors", lambda file: write_safetensors(file, tensors, {}))"""
    taken = peak(code, cwd=tmp_path, before=before)
    assert (tmp_path / "a.safetensors").stat().st_size > 2**29
    assert taken < 80_000, "KiB"
