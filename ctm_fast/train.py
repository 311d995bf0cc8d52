"""``python -m ctm_fast.train``: train an EDM teacher and distil it into a consistency trajectory model."""

import json
from dataclasses import replace
from pathlib import Path

from ctm_fast import runtime
from ctm_fast.training.config import override, to_dict
from ctm_fast.training.presets import PRESETS, preset
from ctm_fast.training.run import train


def main() -> None:
    arguments = _parser().parse_args()
    config = preset(arguments.preset)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=arguments.data))
    if arguments.seed is not None:
        config = replace(config, seed=arguments.seed)
    if arguments.stage is not None:
        config = replace(config, stages=(arguments.stage,))
    config = override(config, arguments.set)
    device = runtime.prepare(arguments.device, arguments.threads)
    if arguments.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return
    train(config, arguments.outdir, device, compile=arguments.compile, teacher=arguments.teacher)


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.train", description=__doc__)
    add = parser.add_argument
    add("--preset", default="digits", help=f"{', '.join(PRESETS)} (default: digits)")
    add("--data", metavar="SOURCE", help="digits, fashion-mnist, a .zip, .npz, .tar, .tar.gz, .parquet or directory")
    add("--outdir", type=Path, default=Path("runs"), help="where run directories are made (default: runs)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--seed", type=int, help="of weights, data order, levels and noise (default: the preset's)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    add("--stage", choices=["teacher", "ctm"], help="only this stage (default: both)")
    add("--teacher", type=Path, metavar="FILE", help="the .safetensors of a teacher, for --stage ctm")
    add("--compile", action="store_true", help="compile the parts of a step for which that pays")
    add("--set", action="append", default=[], metavar="A.B=C", help="change one key of the configuration")
    add("--dry-run", action="store_true", help="print the resolved configuration and stop")
    return parser


if __name__ == "__main__":
    runtime.run(main)
