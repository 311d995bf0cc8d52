"""``python -m ctm_fast.export``: a snapshot's sampling as an AOTInductor package or ONNX; ``load_exported`` runs it."""

import re
from pathlib import Path
from typing import get_args

from ctm_fast import runtime
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.files import check_output
from ctm_fast.ops._library import Backend
from ctm_fast.serving.export import Format, export
from ctm_fast.serving.exported import Exported, load_exported
from ctm_fast.serving.program import Start

__all__ = ["Exported", "load_exported"]

_KERNELS: dict[Backend, str] = {
    "cpp": "the op, which libctm_fast_ops.so brings (on a GPU libctm_fast_cuda.so, too)",
    "triton": "the op, its Triton kernel compiled into the file",
    "sdpa": "PyTorch's scaled_dot_product_attention",
    "reference": "its reference, plain PyTorch",
}


def main() -> None:
    arguments = _parser().parse_args()
    batch = parse_batch(arguments.batch)
    network: Path = arguments.network
    out: Path = arguments.out or network.parent / f"{network.stem}.{arguments.format}"
    check_output("--out", out, f".{arguments.format}", sources=[network], of="the network's")
    try:
        result = export(
            network,
            out,
            arguments.format,
            batch=batch,
            steps=arguments.steps,
            gamma=arguments.gamma,
            start=arguments.start,
            device=arguments.device,
        )
    except CheckpointError as error:
        raise CheckpointError(f"network {error}") from error
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written, got {out}: {error}") from error
    about = result.description
    width = max(map(len, about.ops))
    for op, backend in about.ops.items():
        print(f"{op:<{width}}  {_KERNELS[backend]}")
    print(f"takes {', '.join(about.inputs)} for {about.batch_min} to {about.batch_max} images, on {about.device}")
    print(f"images within {result.difference:.1g} of eager")
    print(out)


def parse_batch(text: str) -> tuple[int, int]:
    """``1-64`` or ``8``, as the fewest and the most images of a call; ConfigError if it is neither."""
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if not match:
        raise ConfigError(f"--batch: expected a range such as 1-64 or a number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.export", description=__doc__)
    add = parser.add_argument
    add("network", type=Path, metavar="F", help="a snapshot-*.safetensors, or user/name on the Hub")
    add("--format", choices=get_args(Format), required=True, help="an AOTInductor package, or ONNX (extra: onnx)")
    add("--batch", default="1-64", metavar="LO-HI", help="the images that a call may ask for (default: 1-64)")
    add("--steps", type=int, default=1, help="jumps of a CTM; levels of a teacher's solver (default: 1)")
    add("--gamma", type=float, default=0.0, help="of gamma-sampling, 0 to 1 (default: 0, deterministic)")
    add("--start", choices=get_args(Start), help="what it starts with (default: seeds; x_T for ONNX)")
    add("--out", type=Path, metavar="FILE", help="(default: F with the suffix of the format)")
    add("--device", help="what a pt2 is compiled for: cpu, cuda, ... (default: the first GPU, else the CPU)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
