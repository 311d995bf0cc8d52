"""What a command line decides before any work: device, threads, precision of products, and how errors are told."""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from ctm_fast.errors import ConfigError, UserError

MATMUL_PRECISION = "high"
"""Of float32 products in training and sampling: TF32 on GPUs that have it. Equality tests use "highest"."""

MAX_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """Arguments whose errors are a ConfigError, one line like any other, not a page of usage."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def default_threads() -> int:
    """Half of the cores that torch sees.

    A step waits for its slowest thread; where other work shares the cores, that thread can make it twenty times slower
    than one thread alone would be.
    """
    return max(1, torch.get_num_threads() // 2)


def prepare(threads: int | None) -> None:
    """Set the number of CPU threads (None: leave it) and the precision of products. Opens no device.

    Raises ConfigError naming the option.
    """
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"--threads: expected 1 to {MAX_THREADS}, got {threads}")
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    torch.backends.cudnn.allow_tf32 = True


def find_device(device: str | None) -> torch.device:
    """The device of that name, by default a GPU if there is one. Raises ConfigError unless it is there.

    Of a job of several ranks, :func:`ctm_fast.distributed.start_ranks` asks: a GPU that is looked at holds memory for
    this process from then on.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device: expected a device of this machine, got {device!r}: {_first_line(error)}"
        ) from error
    return chosen


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the user's or of a file becomes one line and exit code 2, Ctrl-C exit code 130.

    Under torchrun the process ends here: PyTorch's process groups have threads that now and then outlive the
    interpreter and abort it, and torchrun would start a finished job again.
    """
    code = 0
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
