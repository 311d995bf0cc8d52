"""The images of a data set that cannot be taken: all of them are told in one line, the first few by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ctm_fast.data.checks import NAMED, few, size
from ctm_fast.data.decode import LARGEST, MODE, READABLE, SIZE, STILL, Misfit
from ctm_fast.errors import DataError

MOST = 1000
"""With so many the rest is not looked at: a set of a million photographs that nobody has resized yet."""


class Misfits:
    """Counts the images of ``path``, ``count`` in all, in their order; ``remedies`` is what helps against a kind."""

    def __init__(self, path: Path, count: int, remedies: Mapping[str, str]) -> None:
        self._path = path
        self.count = count
        self._remedies = remedies
        self._seen = 0
        self._found: dict[str, list[str]] = {}
        self._numbers: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self._numbers.values())

    @property
    def full(self) -> bool:
        """Whether there were enough."""
        return self.total >= MOST

    def see(self, misfit: Misfit | None) -> None:
        """Count one more image, and what is wrong with it."""
        self._seen += 1
        if misfit is not None:
            named = self._found.setdefault(misfit.kind, [])
            if len(named) < NAMED:
                named.append(misfit.got)
            self._numbers[misfit.kind] = self._numbers.get(misfit.kind, 0) + 1

    def refuse(self, resolution: int, channels: int | None) -> NoReturn:
        """Raise DataError about those that there were."""
        shape = (resolution, resolution) if channels is None else (resolution, resolution, channels)
        start = {
            SIZE: f"expected images of {size(shape)}, got ",
            LARGEST: f"expected images of at most {size((resolution, resolution))}, got ",
            MODE: "expected 8-bit grey or RGB, got ",
            STILL: "expected still images, got ",
            READABLE: "cannot read ",
        }
        told = "; ".join(start[kind] + few(named, self._numbers[kind]) for kind, named in self._found.items())
        looked = f"{self.count}" if self._seen == self.count else f"the first {self._seen} of {self.count}"
        remedies = dict.fromkeys(self._remedies[kind] for kind in self._found if kind in self._remedies)
        raise DataError("; ".join([f"data: {self._path}: {told} ({self.total} of {looked} images)", *remedies]))
