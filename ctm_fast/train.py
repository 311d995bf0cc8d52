"""``python -m ctm_fast.train``: train an EDM teacher and distil it into a consistency trajectory model.

On several devices, ``torchrun --nproc-per-node=N -m ctm_fast.train`` with the same options: the result is the same.
With ``--max-restarts`` torchrun starts all ranks again where one has died, and they go on from the last state.
"""

import json
from dataclasses import replace
from pathlib import Path

from ctm_fast import runtime
from ctm_fast.distributed import finish, one_voice, start_ranks
from ctm_fast.training.config import STAGES, to_dict
from ctm_fast.training.execution import Execution
from ctm_fast.training.overrides import override
from ctm_fast.training.presets import PRESETS, preset
from ctm_fast.training.run import train


@one_voice()
def main() -> None:
    arguments = _parser().parse_args()
    config = preset(arguments.preset)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=arguments.data))
    if arguments.seed is not None:
        config = replace(config, seed=arguments.seed)
    if arguments.stage is not None:
        config = replace(config, stages=tuple(arguments.stage.split(",")))
    config = override(config, arguments.set)
    runtime.prepare(arguments.threads)
    if arguments.dry_run:
        runtime.find_device(arguments.device)  # refused here, too
        print(json.dumps(to_dict(config), indent=2))
        return
    ranks, device = start_ranks(arguments.device)
    try:
        execution = Execution(
            device,
            ranks,
            micro_batch=arguments.micro_batch,
            compile=arguments.compile,
            fsdp=arguments.parallel == "fsdp",
            checkpoint_blocks=arguments.checkpoint_blocks,
        )
        train(
            config,
            arguments.outdir,
            execution,
            teacher=arguments.teacher,
            student=arguments.student,
            keep=arguments.keep,
            tensorboard=arguments.tensorboard,
        )
    finally:
        finish()


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.train", description=__doc__)
    add = parser.add_argument
    add("--preset", default="digits", help=f"{', '.join(PRESETS)} (default: digits)")
    add("--data", metavar="SOURCE", help="digits, fashion-mnist, a .zip, .npz, .tar, .tar.gz, .parquet or directory")
    add("--outdir", type=Path, default=Path("runs"), help="where run directories are made (default: runs)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, else the CPU)")
    add("--seed", type=int, help="of weights, data order, levels and noise (default: the preset's)")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    add("--stage", metavar="STAGES", help=f"a stretch of {','.join(STAGES)} (default: the preset's)")
    add("--teacher", type=Path, metavar="FILE", help="the .safetensors of a teacher, for stages without teacher")
    add("--student", type=Path, metavar="FILE", help="the .safetensors of a CTM to start ctm or gan from")
    add("--compile", action="store_true", help="compile the parts of a step for which that pays")
    add("--micro-batch", type=int, metavar="N", help="samples at once on a rank (default: its share of the batch)")
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="all of the networks on every rank, or sharded")
    add("--checkpoint-blocks", action="store_true", help="make activations again in the backward pass")
    add("--keep", type=int, metavar="N", help="keep the last N snapshots of a stage (default: all)")
    add("--tensorboard", action="store_true", help="also write event files, into RUN/tensorboard (extra: tensorboard)")
    add("--set", action="append", default=[], metavar="A.B=C", help="change one key of the configuration")
    add("--dry-run", action="store_true", help="print the resolved configuration and stop")
    return parser


if __name__ == "__main__":
    runtime.run(main)
