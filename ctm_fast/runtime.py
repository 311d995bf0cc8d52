"""What a command line decides before any work: device, threads, precision of products, and how errors are told."""

import sys
from collections.abc import Callable

import torch

from ctm_fast.errors import ConfigError, UserError

MATMUL_PRECISION = "high"
"""Of float32 products in training and sampling: TF32 on GPUs that have it. Equality tests use "highest"."""


def prepare(device: str | None, threads: int | None) -> torch.device:
    """Set the number of CPU threads and the precision of products; the device, by default the first GPU if any.

    Raises ConfigError naming the option.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    torch.backends.cudnn.allow_tf32 = True
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: expected a device of this machine, got {device!r}: {_first_line(error)}") from error
    return chosen


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the user's becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
