"""Functions that run as the ranks of a job: gloo processes on this machine, which meet as under torchrun."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctm_fast.distributed import Ranks, finish, start_ranks


def in_ranks(function: Callable[[Ranks, Path], Any], size: int, directory: Path) -> list[Any]:
    """What ``function`` of a module returned on each of ``size`` ranks; tensors, numbers, words and lists of them."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (function, size, port, directory), nprocs=size)
    return [torch.load(directory / f"{size}-{rank}.pt") for rank in range(size)]


def _rank(rank: int, function: Callable[[Ranks, Path], Any], size: int, port: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks, device = start_ranks("cpu")
    try:
        assert (ranks, device) == (Ranks(rank, size, rank), torch.device("cpu"))
        torch.save(function(ranks, directory), directory / f"{size}-{rank}.pt")
    finally:
        finish()
    # As the commands end under torchrun (``runtime.run``): with sharded networks, caches of DTensor keep the process
    # group alive, and a thread of it that lets go of a tensor while the interpreter shuts down aborts the process.
    os._exit(0)
