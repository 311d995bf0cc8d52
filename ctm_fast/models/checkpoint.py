"""Models on disk: safetensors, with all that is needed to rebuild and to date them in the metadata."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ctm_fast import __version__
from ctm_fast.errors import CheckpointError, reason
from ctm_fast.files import atomic_write
from ctm_fast.models.config import NetworkConfig, check_fits
from ctm_fast.models.ctm import CTM
from ctm_fast.models.edm import EDMDenoiser
from ctm_fast.models.safetensors_file import DTYPES, write_safetensors
from ctm_fast.models.unet import Weightless, build_network, empty_as

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
    atomic_write(path, lambda file: write_safetensors(file, model.net.state_dict(), header))


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
    path = Path(path)
    header, kinds, identity = _read(path)
    try:
        network = NetworkConfig(**_tuples(json.loads(header["network"])))
        kind = _KINDS[header["kind"]]
        check_fits(network, len(kinds), path.stat().st_size)
        with Weightless():  # what describes a huge network must not take its memory
            net = build_network(network, s_branch=kind is CTM)
        sigma_data = float(json.loads(header["sigma_data"]))
        metadata = dict(json.loads(header["metadata"]))
    except Exception as error:  # a foreign description may fail at any depth
        raise CheckpointError(f"{path}: the description of the model does not fit: {reason(error)}") from error
    if not (math.isfinite(sigma_data) and sigma_data > 0):
        raise CheckpointError(f"{path}: sigma_data: expected a positive number, got {sigma_data}")
    expected = net.state_dict()
    _check_weights(path, kinds, expected)
    net.load_state_dict(_weights(path, expected, identity), assign=True)
    model = kind(net, sigma_data, dtype=dtype)
    return model.eval().requires_grad_(False).to(device), {**metadata, "network": network}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that a model was saved with, without its weights; CheckpointError if ``path`` is no such file."""
    path = Path(path)
    header, _, _ = _read(path)
    try:
        return dict(json.loads(header["metadata"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of the model does not fit: {reason(error)}") from error


def combine_models(
    paths: Sequence[Path], weights: Sequence[float], progress: Callable[[list[str]], Iterable[str]] = iter
) -> CTM | EDMDenoiser:
    """The model whose parameters are sum_i weights[i] * (those in paths[i]), summed in float64; in eval mode.

    Buffers are those of the last file. Takes the memory of one model and one tensor, however many files there are.

    Args:
        paths: files written by :func:`save_model`, of one network.
        weights: as many.
        progress: given the names of the parameters, goes through them: a bar, say.

    Raises CheckpointError naming the first file that cannot be read, or holds another network than the last.
    """
    model, _ = load_model(paths[-1])
    expected = model.net.state_dict()
    identities = []
    for path in paths:
        _, kinds, identity = _read(path)
        _check_weights(path, kinds, expected)
        identities.append(identity)
    parameters = dict(model.net.named_parameters())
    for name in progress(list(parameters)):
        total = torch.zeros_like(parameters[name], dtype=torch.float64)
        for path, weight, identity in zip(paths, weights, identities, strict=True):
            total.add_(_weights(path, {name: expected[name]}, identity)[name], alpha=weight)
        parameters[name].copy_(total)
    return model


def _check_weights(path: Path, kinds: Mapping[str, str], expected: Mapping[str, torch.Tensor]) -> None:
    """CheckpointError naming the first tensor whose name, shape or dtype is not as expected."""
    for name in sorted(expected.keys() | kinds.keys()):
        if name not in kinds:
            raise CheckpointError(f"{path}: holds another architecture: tensor {name} is missing")
        if name not in expected:
            raise CheckpointError(f"{path}: holds another architecture: tensor {name} is not in the network")
        wanted, got = _kind(expected[name].dtype, list(expected[name].shape)), kinds[name]
        if wanted != got:
            raise CheckpointError(f"{path}: holds another architecture: tensor {name}: expected {wanted}, got {got}")


def _kind(dtype: torch.dtype | str, shape: list[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _read(path: Path) -> tuple[dict[str, str], dict[str, str], tuple[int, ...]]:
    """The metadata, dtype and shape of each tensor, and which file it was."""
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: expected a .safetensors file, got {'a directory' if path.is_dir() else 'no such file'}"
            )
        identity = _identity(path)
        kinds = {}
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (it is not a mapping)
                described = file.get_slice(name)
                dtype = described.get_dtype()
                kinds[name] = _kind(DTYPES.get(dtype, dtype), list(described.get_shape()))
    except (SafetensorError, OSError) as error:
        if _is_pickle(path):
            message = f"{path}: expected a .safetensors file of ctm_fast, got a pickle, which is never loaded"
            raise CheckpointError(message) from error
        raise CheckpointError(f"{path}: not a complete .safetensors file: {reason(error)}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {header.get('format')!r}")
    return header, kinds, identity


def _weights(path: Path, expected: Mapping[str, torch.Tensor], identity: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The tensors with the strides of those ``expected``, in memory of their own."""
    weights = {}
    try:
        for name, wanted in expected.items():
            # Opened for each: a file that is mapped whole takes the memory of all tensors a second time.
            with safe_open(path, framework="pt") as file:
                weights[name] = empty_as(wanted).copy_(file.get_tensor(name))
        changed = _identity(path) != identity
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the file changed while it was being read: {reason(error)}") from error
    if changed:
        raise CheckpointError(f"{path}: the file changed while it was being read")
    return weights


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _is_pickle(path: Path) -> bool:
    """Whether it starts as a pickle or as PyTorch's zip of one. (So may the length that a .safetensors starts with.)"""
    try:
        with path.open("rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    except OSError:
        return False


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
