"""Models on disk: safetensors, with all that is needed to rebuild and to date them in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ctm_fast import __version__
from ctm_fast.errors import CheckpointError
from ctm_fast.files import atomic_write
from ctm_fast.models.config import NetworkConfig, build_network
from ctm_fast.models.ctm import CTM
from ctm_fast.models.edm import EDMDenoiser

FORMAT = "ctm_fast.model.1"
_KINDS: dict[str, type[CTM] | type[EDMDenoiser]] = {"ctm": CTM, "edm": EDMDenoiser}


def save_model(
    path: str | Path, model: CTM | EDMDenoiser, network: NetworkConfig, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write ``model`` to ``path`` (.safetensors), complete or not at all.

    ``network`` must describe ``model.net``; ``metadata`` is any further JSON (configuration, seed, step).
    """
    kind = next(name for name, cls in _KINDS.items() if isinstance(model, cls))
    header = {
        "format": FORMAT,
        "ctm_fast": __version__,
        "kind": kind,
        "network": json.dumps(asdict(network)),
        "sigma_data": json.dumps(model.sigma_data),
        "metadata": json.dumps(dict(metadata or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.net.state_dict().items()}
    data = save(tensors, metadata=header)
    atomic_write(path, lambda file: file.write(data))


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[CTM | EDMDenoiser, dict[str, Any]]:
    """The model in ``path``, in eval mode, and the metadata it was saved with.

    Args:
        path: a file written by :func:`save_model`. Pickles are refused unread.
        device: where the model goes.
        dtype: what its network computes in.

    Raises CheckpointError naming the file, for anything that is not such a file or does not fit its own description.
    """
    header, tensors = _read(Path(path))
    try:
        network = NetworkConfig(**_tuples(json.loads(header["network"])))
        net = build_network(network, s_branch=header["kind"] == "ctm")
        model = _KINDS[header["kind"]](net, json.loads(header["sigma_data"]), dtype=dtype)
        metadata = json.loads(header["metadata"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of the model does not fit: {error}") from error
    load_weights(model.net, tensors, str(path))
    return model.eval().requires_grad_(False).to(device), {"network": network, **metadata}


def load_weights(net: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy ``tensors`` into ``net``; CheckpointError naming ``source`` and the first tensor that does not fit."""
    expected = net.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{source}: holds another architecture: tensor {name} is missing")
        if name not in expected:
            raise CheckpointError(f"{source}: holds another architecture: tensor {name} is not in the network")
        if tensors[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: holds another architecture: tensor {name}: expected shape {list(expected[name].shape)}, "
                f"got {list(tensors[name].shape)}"
            )
    net.load_state_dict(dict(tensors))


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a .safetensors file, found none")
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(f"{path}: expected a .safetensors file of ctm_fast, got a pickle, which is never loaded")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {header.get('format')!r}")
    return header, tensors


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
