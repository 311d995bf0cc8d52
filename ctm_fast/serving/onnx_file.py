"""Programs as ONNX files: written from a graph of plain PyTorch, run by ONNX Runtime on the CPU.

Needs the extra ``onnx``; without it :func:`need_onnx` says so, and nothing else here works.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.serving.program import Description

try:
    import onnxruntime
    import onnxscript  # noqa: F401 (what torch.onnx writes with)

    _MISSING = None
except ImportError as error:
    _MISSING = str(error)


def need_onnx(what: str) -> None:
    """ConfigError, naming ``what`` and the extra, where ONNX is not installed."""
    if _MISSING is not None:
        raise ConfigError(f"{what}: ONNX needs the extra onnx: pip install ctm_fast[onnx] ({_MISSING})")


def write_onnx(exported: torch.export.ExportedProgram, description: Description, path: Path) -> None:
    """Write a graph without ops of ours, weights included, to ``path``."""
    with _quiet():
        written = torch.onnx.export(
            exported,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=description.inputs,
            output_names=["images"],
        )
    assert written is not None
    written.model.metadata_props.update(description.metadata())
    written.save(path)


def open_onnx(path: Path) -> tuple[Description, Callable[..., Tensor]]:
    """What the file says it is, and a function of its inputs. CheckpointError for a file that is no program of ours."""
    need_onnx(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes as an exception
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class of its own for each state of its C library
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: expected an ONNX file of ctm_fast.export: {reason}") from error
    try:
        description = Description.of(session.get_modelmeta().custom_metadata_map)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if (names := [node.name for node in session.get_inputs()]) != description.inputs:
        raise CheckpointError(f"{path}: expected the inputs {description.inputs}, got {names}")

    def run(*inputs: Tensor) -> Tensor:
        feed: dict[str, np.ndarray] = {
            name: tensor.numpy() for name, tensor in zip(description.inputs, inputs, strict=True)
        }
        return torch.from_numpy(session.run(["images"], feed)[0])

    return description, run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says about packages and types that are not used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
