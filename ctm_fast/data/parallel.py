"""Work on many images by threads, in order: Pillow and zlib let others run while they decode and encode."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import distributed
from tqdm import tqdm

_BLOCK = 16  # images: handing one to a thread takes as long as decoding a small one
_AHEAD = 2  # blocks for each thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, count: int, what: str) -> Iterator[Result]:
    """``function(item)`` for each item, in the order of ``items``, by as many threads as torch may use.

    ``items`` is gone through on the calling thread, at most a few blocks ahead of the results. On a terminal, a bar
    says how many of ``count`` are done, if it takes more than a second. What ``function`` raises is raised.
    """

    def block_of(block: list[Item]) -> list[Result]:
        return [function(item) for item in block]

    threads = torch.get_num_threads()
    ahead: deque[Future[list[Result]]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=count, desc=what, unit="image", disable=_disabled(), dynamic_ncols=True, delay=1) as bar,
    ):
        try:
            for block in _blocks(items):
                ahead.append(pool.submit(block_of, block))
                if len(ahead) > _AHEAD * threads:
                    yield from _done(ahead, bar)
            while ahead:
                yield from _done(ahead, bar)
        finally:
            for future in ahead:
                future.cancel()


def _done(ahead: deque[Future[list[Result]]], bar: "tqdm[Item]") -> list[Result]:
    results = ahead.popleft().result()
    bar.update(len(results))
    return results


def _blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, _BLOCK)):
        yield block


def _disabled() -> bool | None:
    """tqdm's None: unless on a terminal."""
    other = distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0
    return True if other else None
