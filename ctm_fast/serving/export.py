"""From a snapshot to a file that samples without ctm_fast: traced, compiled, run and compared, and only then there."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from ctm_fast import runtime
from ctm_fast.errors import ConfigError
from ctm_fast.files import atomic_write, file_sha256
from ctm_fast.models.repository import weights_file
from ctm_fast.ops import use_reference
from ctm_fast.serving.exported import load_exported
from ctm_fast.serving.onnx_file import need_onnx, write_onnx
from ctm_fast.serving.program import (
    MOST_IMAGES,
    Description,
    Program,
    Start,
    carried_ops,
    describe_program,
    trace,
)
from ctm_fast.serving.pt2_file import write_pt2
from ctm_fast.serving.sampler import load

Format = Literal["pt2", "onnx"]

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""How far an exported program's images, in [-1, 1], may be from eager ones. On a GPU products are TF32's in both."""


@dataclass(frozen=True)
class Result:
    """What :func:`export` wrote."""

    path: Path
    description: Description
    difference: float
    """The largest between an image of the file and the eager one, in [-1, 1]."""


def export(
    network: str | Path,
    out: str | Path,
    format: Format,
    *,
    batch: tuple[int, int] = (1, 64),
    steps: int = 1,
    gamma: float = 0.0,
    start: Start | None = None,
    device: str | torch.device | None = None,
) -> Result:
    """Write the sampling of a snapshot to ``out``, whole or not at all, once its images have been compared with eager.

    An op of ctm_fast stays an op where the program can carry it: in a .pt2 those that serve a compiled network on
    the device, see ``python -m ctm_fast.report``. All else is plain PyTorch, as is everything in ONNX.

    Args:
        network: of a CTM or a teacher, as for :func:`ctm_fast.serving.load`.
        out: the .pt2 or .onnx.
        format: "pt2", an AOTInductor package for ``device``, or "onnx".
        batch: the fewest and the most images of a call.
        steps, gamma: as for a :class:`ctm_fast.serving.Sampler`.
        start: "seeds" or "x_T", the program's first input; by default seeds for pt2. ONNX takes x_T only.
        device: by default the first GPU, else the CPU; the CPU for ONNX.

    Raises ConfigError, LevelError or CheckpointError before anything is compiled; RuntimeError if the images differ.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    start = start or ("seeds" if format == "pt2" else "x_T")
    if start not in get_args(Start):
        raise ConfigError(f"start: expected one of {', '.join(get_args(Start))}, got {start!r}")
    if not 1 <= batch[0] <= batch[1] <= MOST_IMAGES:
        raise ConfigError(f"batch: expected LO-HI with 1 <= LO <= HI <= {MOST_IMAGES}, got {batch[0]}-{batch[1]}")
    chosen = runtime.find_device(None if device is None else str(device))
    if format == "onnx":
        need_onnx("format")
        if start == "seeds":
            raise ConfigError("start: expected x_T for onnx, which has no generator of the seeds' noise, got 'seeds'")
        if device is not None and chosen.type != "cpu":
            raise ConfigError(f"device: expected cpu for onnx, got {device}")
        chosen = torch.device("cpu")
    path = weights_file(network)
    sampler = load(path, device=chosen)
    program = Program(sampler.model, sampler.levels, start=start, steps=steps, gamma=gamma)
    sha256 = file_sha256(path)
    with tempfile.TemporaryDirectory(prefix="ctm_fast-export-") as folder:
        built = Path(folder) / f"program.{format}"
        if format == "onnx":
            with use_reference():
                exported = trace(program, batch)
                description = describe_program(program, batch, carried_ops(program, exported), sha256)
                write_onnx(exported, description, built)
        else:
            exported = trace(program, batch)
            description = describe_program(program, batch, carried_ops(program, exported), sha256)
            write_pt2(exported, description, built)
        difference = compare(program, built, sorted({batch[0], min(batch[1], batch[0] + 2)}))
        with built.open("rb") as content:
            atomic_write(out, lambda file: shutil.copyfileobj(content, file))
    return Result(Path(out), description, difference)


@torch.no_grad()
def compare(program: Program, path: Path, batches: list[int]) -> float:
    """The largest difference between images of the file and of ``program``, eager, at each of these batch sizes.

    Raises RuntimeError if it is not within ``TOLERANCE``.
    """
    exported = load_exported(path)
    about = exported.description
    difference = 0.0
    for batch in batches:
        inputs = program.example(batch)
        images = exported(**dict(zip(about.inputs, inputs, strict=True)))
        eager = program(*inputs)
        off = float((images.to(eager.device) - eager).abs().max())  # a program for cuda:1 is run on the current GPU
        if not off <= TOLERANCE[about.device]:
            raise RuntimeError(
                f"the exported program's images are off by {off} at batch {batch}, more than {TOLERANCE[about.device]}"
            )
        difference = max(difference, off)
    return difference
