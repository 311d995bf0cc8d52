"""``python -m ctm_fast.reconstruct``: the average of any width from a finished run's power-function averages."""

from pathlib import Path

from ctm_fast import runtime
from ctm_fast.errors import CheckpointError, ConfigError
from ctm_fast.files import check_output
from ctm_fast.training.power_ema import gamma_of
from ctm_fast.training.reconstruction import reconstruct


def main() -> None:
    arguments = _parser().parse_args()
    run, out = arguments.run, arguments.out
    files = sorted(run.glob("ema-power_*.safetensors"))
    if not files:
        raise ConfigError(f"RUNDIR: expected the directory of a run with ema-power_*.safetensors, got {run}")
    check_output("--out", out, ".safetensors", sources=files, of="the run's averages")
    runtime.prepare(arguments.threads)
    try:
        gamma_of(arguments.ema)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
    try:
        distance = reconstruct(files, arguments.ema, out, stage=arguments.stage, step=arguments.step)
    except CheckpointError as error:
        raise CheckpointError(f"RUNDIR: {error}") from error
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written, got {out}: {error}") from error
    print(f"{out}: the profile is {100 * distance:.2g} % off")


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.reconstruct", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUNDIR", help="the directory of a run with ema-power_*.safetensors")
    add("--ema", type=float, required=True, metavar="WIDTH", help="sigma_rel, relative to the steps: 0.08")
    add("--stage", help="which stage's averages (default: the only one)")
    add("--step", type=int, help="the average as it was after this step (default: the last)")
    add("--out", type=Path, required=True, metavar="FILE", help="the .safetensors to write")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
