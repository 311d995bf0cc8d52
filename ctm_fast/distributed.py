"""The ranks of a training job: who they are, and what they tell one another. The one place that starts them.

Without torchrun there is one rank and no process group, and every function here returns what it was given. Words
(configurations, digests, decisions) travel as CPU tensors over gloo, also between GPUs: they wait for no device.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctm_fast.errors import ConfigError
from ctm_fast.runtime import find_device

_BUCKET = 2**25  # bytes of gradients in one all-reduce
_TEXT = 400  # bytes in which a rank says how it differs


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job: ``rank`` of ``size``, number ``local_rank`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The positions of a global batch that are this rank's: as many for each, in the order of ranks.

        Raises ConfigError unless ``batch`` is a positive multiple of the number of ranks.
        """
        if batch < 1 or batch % self.size:
            raise ConfigError(f"batch: expected a multiple of the {self.size} ranks, got {batch}")
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def start_ranks(device: str | None) -> tuple[Ranks, torch.device]:
    """Meet the other ranks that torchrun started; this rank and its device.

    Args:
        device: cpu, cuda, or None for GPUs where there are any. Under torchrun a rank takes the GPU of its local rank.

    Raises ConfigError, before meeting anyone, for a device that is not there or not this rank's.
    """
    if "WORLD_SIZE" not in os.environ:
        return Ranks(), find_device(device)
    ranks = Ranks(_variable("RANK"), _variable("WORLD_SIZE"), _variable("LOCAL_RANK"))
    chosen = find_device(device)
    if chosen.type == "cuda":
        if chosen.index not in (None, ranks.local_rank):
            raise ConfigError(
                f"--device: expected cuda under torchrun, where local rank {ranks.local_rank} takes "
                f"cuda:{ranks.local_rank}, got {device!r}"
            )
        count = torch.cuda.device_count()
        if ranks.local_rank >= count:
            raise ConfigError(
                f"--nproc-per-node: expected at most {count}, a GPU for each rank, got local rank {ranks.local_rank}"
            )
        chosen = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    return ranks, chosen


def finish() -> None:
    """Leave the other ranks, if there are any. Called last, after success as after an error."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every rank has called this. Waits for no device."""
    if _several():
        dist.all_reduce(torch.zeros(1))


def of_first(value: Any) -> Any:
    """Rank 0's ``value``, a JSON value, on every rank; those of the others are not looked at."""
    if not _several():
        return value
    first = dist.get_rank() == 0
    text = json.dumps(value).encode() if first else b""
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    message = _bytes(text) if first else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, 0)
    return json.loads(message.numpy().tobytes())


def agree(name: str, value: Any) -> None:
    """Return if every rank holds the same JSON ``value``; else ConfigError on every rank.

    The message names the first rank that differs from rank 0, and the first key at which it does.
    """
    if not _several():
        return
    text = json.dumps(value, sort_keys=True)
    digests = _gather(_bytes(hashlib.sha256(text.encode()).digest()))
    if all(torch.equal(digest, digests[0]) for digest in digests):
        return
    rank = next(rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0]))
    difference = next(_differences(of_first(value), json.loads(text), rank), "").encode()[:_TEXT]
    said = _gather(_bytes(difference.ljust(_TEXT)))[rank].numpy().tobytes().decode(errors="replace").rstrip()
    raise ConfigError(f"{name}: expected the same on every rank, got {said}")


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks of a small tensor, float64, the same on every rank."""
    total = values.detach().double()
    if _several():
        total = total.clone()
        dist.all_reduce(total)
    return total


def all_mean(values: Tensor) -> Tensor:
    """The mean over ranks of a small tensor, float64, the same on every rank."""
    return all_sum(values) / (dist.get_world_size() if _several() else 1)


def sum_over_ranks_(values: Tensor) -> Tensor:
    """Replace a tensor, which may be large, by its sum over ranks, in its own dtype; the tensor."""
    if _several():
        dist.all_reduce(values)
    return values


def take_first_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def average_gradients(parameters: Iterable[Tensor], extra: Iterable[Tensor] = ()) -> None:
    """Replace ``.grad`` of each parameter, and each tensor of ``extra``, by its mean over ranks: the same bits on each.

    Every rank gives the same parameters and the same ``extra``, in the same order. A parameter without a gradient on
    every rank stays without. No device is waited for.

    Raises RuntimeError on every rank if a parameter has a gradient on some ranks only.
    """
    if not _several():
        return
    size = dist.get_world_size()
    gradients = [parameter.grad for parameter in parameters]
    holders = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.int32)
    dist.all_reduce(holders)
    for index, holding in enumerate(holders.tolist()):
        if holding not in (0, size):
            raise RuntimeError(
                f"parameters: expected a gradient on all of {size} ranks or on none, "
                f"got number {index} with one on {holding}"
            )
    tensors = [gradient for gradient in gradients if gradient is not None]
    pending = []
    for bucket in _buckets([*tensors, *extra]):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        assert work is not None
        work.wait()
        means = flat.div_(size).split([tensor.numel() for tensor in bucket])
        with torch.no_grad():
            torch._foreach_copy_(bucket, [mean.view(tensor.shape) for mean, tensor in zip(means, bucket, strict=True)])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _variable(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name}: expected the number that torchrun sets beside WORLD_SIZE, got {text!r}")
    return int(text)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _gather(message: Tensor) -> list[Tensor]:
    """The message of every rank; all are of one length."""
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(messages, message)
    return messages


def _differences(first: Any, other: Any, rank: int, path: str = "") -> Iterator[str]:
    """``key = b on rank r, a on rank 0`` for everything in which two JSON values differ."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            yield from _differences(first.get(key), other.get(key), rank, f"{path}.{key}" if path else key)
        return
    was, is_ = (json.dumps(value, sort_keys=True) for value in (first, other))
    if was != is_:
        yield f"{path} = {is_} on rank {rank}, {was} on rank 0".removeprefix(" = ")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, by dtype, in lists of at most ``_BUCKET`` bytes (or of one tensor)."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if tensor.dtype != dtype:
                continue
            if bucket and size + tensor.nbytes > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket
