"""Sampling as one program of tensors alone, which a compiler can take out of Python, and what its file says of it."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctm_fast import __version__
from ctm_fast.diffusion.schedule import Levels, sampler_sigmas
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.ops._library import INTERPRETED, Backend, use_reference
from ctm_fast.samplers import generate, generate_from, generation_sigmas, renoise_levels

FORMAT = "ctm_fast.export.1"
MOST_STEPS = 100
MOST_IMAGES = 65_536

Start = Literal["seeds", "x_T"]

_IN_JSON: dict[Any, Any] = {int: int, float: int | float, dict[str, Backend]: dict}


@dataclass(frozen=True)
class Description:
    """What an exported program is and takes; it stands in the file, a string of JSON for each field."""

    kind: str
    """"ctm" or "edm"."""
    start: Start
    """Its first input: ``seeds`` [B] int64, or ``x_T`` [B, C, H, W] float32 at level sigma_max."""
    steps: int
    gamma: float
    num_classes: int
    """With any, ``labels`` [B] int64 is the next input."""
    noises: int
    """With any, ``noises`` [B, noises, C, H, W] float32, N(0, I), is the last input: for the re-noisings."""
    channels: int
    resolution: int
    batch_min: int
    batch_max: int
    sigma_data: float
    sigma_min: float
    sigma_max: float
    rho: float
    device: str
    """"cpu" or "cuda": what it was compiled for."""
    ops: dict[str, Backend]
    """The ops of ctm_fast in it -> which of their kernels it holds or calls."""
    source_sha256: str
    """Of the model's file."""
    ctm_fast: str = __version__
    torch: str = torch.__version__
    format: str = FORMAT

    @property
    def inputs(self) -> list[str]:
        """The names of its inputs, in order."""
        return [self.start] + ["labels"] * bool(self.num_classes) + ["noises"] * bool(self.noises)

    def metadata(self) -> dict[str, str]:
        """The strings that the file holds; plain text where a field is text."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Description":
        """Out of such strings. CheckpointError for those of another format."""
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"expected format {FORMAT}, got {metadata.get('format')!r}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = metadata.get(field.name, "")
            try:
                value = text if field.type in (str, Start) else json.loads(text)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, _IN_JSON.get(field.type, object)):
                raise CheckpointError(f"expected the description of a program, got {field.name} = {text[:80]!r}")
            values[field.name] = value
        return cls(**values)


class Program(nn.Module):
    """``program(start, [labels], [noises])`` -> images [B, C, H, W] float32 in [-1, 1], as a ``Sampler`` makes them.

    The inputs are those of :attr:`Description.inputs`.

    Args:
        model: a CTM, or an EDM denoiser.
        levels: the range of noise levels it was trained on.
        start: what its first input is.
        steps, gamma: as for :class:`ctm_fast.serving.Sampler`; they become part of the program.

    Raises ConfigError or LevelError naming the argument.
    """

    def __init__(self, model: CTM | EDMDenoiser, levels: Levels, *, start: Start, steps: int, gamma: float) -> None:
        super().__init__()
        if not 1 <= steps <= MOST_STEPS:
            raise ConfigError(f"steps: expected 1 to {MOST_STEPS}, each being compiled on its own, got {steps}")
        sigmas = sampler_sigmas(steps, levels).tolist()
        renoised = any(s != sigma for s, sigma in zip(renoise_levels(sigmas, gamma), sigmas[1:], strict=True))
        if gamma and isinstance(model, EDMDenoiser):
            raise ConfigError(f"gamma: expected 0 for a teacher, whose solver is deterministic, got {gamma}")
        self.model = model.eval()
        self.levels = levels
        self.start = start
        self.steps = steps
        self.gamma = gamma
        self.renoised = renoised
        self.noises = steps - 1 if renoised and start == "x_T" else 0

    @property
    def ops(self) -> list[str]:
        """The ops of ctm_fast that it is made of."""
        fused = self.renoised and self.start == "seeds"  # jump and re-noising in one
        return [
            *(["philox_normal"] if self.start == "seeds" else []),
            *("precond_input", "noise_embed", "group_norm_silu", "conv3x3", "attention"),
            *(["gamma_step"] if fused else []),
            "precond_combine",
        ]

    def forward(self, *inputs: Tensor) -> Tensor:
        left = list(inputs)
        first = left.pop(0)
        labels = left.pop(0) if self.model.net.label_dim else None
        model, levels, steps, gamma = self.model, self.levels, self.steps, self.gamma
        if self.start == "seeds":
            images = generate(model, levels, first, labels, steps=steps, gamma=gamma)
        else:
            renoise = (lambda i, x: left[0][:, i]) if self.noises else None
            sigmas = generation_sigmas(model, steps, levels)
            images = generate_from(model, first, sigmas, labels, gamma=gamma, renoise=renoise)
        return images.clamp(-1, 1)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs for ``batch`` images, the same at each call."""
        net, device = self.model.net, self.model.net.out_conv.weight.device
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        generator = torch.Generator().manual_seed(batch)
        if self.start == "seeds":
            inputs = [torch.randint(2**63 - 1, (batch,), generator=generator)]
        else:
            inputs = [self.levels.sigma_max * torch.randn(batch, *shape, generator=generator)]
        if net.label_dim:
            inputs.append(torch.arange(batch) % net.label_dim)
        if self.noises:
            inputs.append(torch.randn(batch, self.noises, *shape, generator=generator))
        return tuple(tensor.to(device) for tensor in inputs)


def trace(program: Program, batch: tuple[int, int]) -> torch.export.ExportedProgram:
    """``program`` as a graph for any batch from batch[0] to batch[1]."""
    low, high = batch
    # torch takes a size of 1 for a constant.
    inputs = program.example(min(high, max(low, 2)))
    sizes = {0: torch.export.Dim("batch", min=low, max=high)} if low < high else {}
    # Triton's interpreter is Python, which no program carries.
    carried = use_reference() if INTERPRETED else contextlib.nullcontext()
    with torch.no_grad(), carried:
        return torch.export.export(program, inputs, dynamic_shapes={"inputs": tuple(sizes for _ in inputs)})


def carried_ops(program: Program, exported: torch.export.ExportedProgram) -> dict[str, Backend]:
    """Each op of ``program`` -> the kernel that the graph calls; "reference" where it is plain PyTorch."""
    calls = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}

    def backend(op: str) -> Backend:
        if f"ctm_fast.{op}.default" in calls:
            return "cpp"
        if f"ctm_fast_triton.{op}.default" in calls:
            return "triton"
        if op == "attention" and "aten.scaled_dot_product_attention.default" in calls:
            return "sdpa"
        return "reference"

    return {op: backend(op) for op in program.ops}


def describe_program(
    program: Program, batch: tuple[int, int], ops: Mapping[str, Backend], source_sha256: str
) -> Description:
    """What the file of ``program`` says."""
    model, net, levels = program.model, program.model.net, program.levels
    return Description(
        kind="ctm" if isinstance(model, CTM) else "edm",
        start=program.start,
        steps=program.steps,
        gamma=program.gamma,
        num_classes=net.label_dim,
        noises=program.noises,
        channels=net.img_channels,
        resolution=net.img_resolution,
        batch_min=batch[0],
        batch_max=batch[1],
        sigma_data=model.sigma_data,
        sigma_min=levels.sigma_min,
        sigma_max=levels.sigma_max,
        rho=levels.rho,
        device=net.out_conv.weight.device.type,
        ops=dict(ops),
        source_sha256=source_sha256,
    )
