"""Many images over many processes: the seeds are cut into shards, each made by one rank, in one batch.

Which images share a batch depends on the seeds and the batch size alone, so that any number of ranks, killed and
started again however often, writes the same bytes. Ranks exchange nothing but files: one that is late keeps nobody
waiting.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ctm_fast.distributed import Ranks

Pixels = NDArray[np.uint8]
"""[N, H, W, C]."""


@dataclass(frozen=True)
class Shard:
    """Seeds whose images are made together, and their classes, None for an unconditional model."""

    index: int
    seeds: Sequence[int]
    labels: Sequence[int] | None


class Output(Protocol):
    """Where the images of shards go. What ``has`` admits to is whole, whenever a process is killed."""

    def has(self, shard: Shard) -> bool:
        """Whether the images of ``shard`` are there."""

    def write(self, shard: Shard, images: Pixels) -> None:
        """Keep the images of ``shard``; called by its rank alone."""

    def finish(self, shards: Sequence[Shard]) -> None:
        """After the last shard of the first rank, by that rank alone."""


def cut(seeds: Sequence[int], labels_of: Callable[[Sequence[int]], list[int] | None], batch: int) -> list[Shard]:
    """Shards of ``batch`` seeds, in order; the last may be smaller."""
    parts = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    return [Shard(index, part, labels_of(part)) for index, part in enumerate(parts)]


def make_shards(make: Callable[[Shard], Pixels], shards: Sequence[Shard], output: Output, ranks: Ranks) -> None:
    """Make this rank's shards, every ``ranks.size``-th, but for those that ``output`` has.

    A shard is written while the next is made. The first rank shows a bar of its own share, on a terminal.
    """
    mine = shards[ranks.rank :: ranks.size]
    images = sum(len(shard.seeds) for shard in mine)
    name = f"rank 0 of {ranks.size}" if ranks.size > 1 else None
    writing: Future[None] | None = None
    with (
        tqdm(total=images, desc=name, unit="image", disable=None if ranks.is_first else True) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        for shard in mine:
            if not output.has(shard):
                made = make(shard)
                if writing is not None:
                    writing.result()
                writing = writer.submit(output.write, shard, made)
            bar.update(len(shard.seeds))
        if writing is not None:
            writing.result()
    if ranks.is_first:
        output.finish(shards)
