"""Pickles read as data: a machine for their opcodes that builds containers and calls nothing the file names.

A name in the file stands for the entry of a table of admitted names, and for nothing if there is none: no import, no
attribute, no method of a foreign class. What a pickle writes at protocols 2 to 5 is understood, except what objects
with code of their own need (``INST``, ``OBJ``, ``EXT1``, ``NEWOBJ_EX``, ...). Every length is held against the bytes
that are there before anything is allocated, and a :class:`Budget` bounds the work.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from ctm_fast.errors import CheckpointError
from ctm_fast.models.published.spans import Span

_PROTOCOLS = range(2, 6)
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_MAX_LINE = 512
_MAX_INT_BYTES = 16
_MAX_KEY = 2**61 - 1


@dataclass
class Budget:
    """What all pickles of one file may take together. The largest published file needs a sixth of it."""

    opcodes: int = 400_000
    text: int = 2**26

    def spend(self, opcodes: int = 0, text: int = 0) -> None:
        """Raises CheckpointError when there is no more."""
        self.opcodes -= opcodes
        self.text -= text
        if self.opcodes < 0 or self.text < 0:
            raise CheckpointError("its pickle is larger than that of any file of weights")


@dataclass(frozen=True)
class Admitted:
    """An admitted name: ``make(arguments)`` is what a call of it stands for; ``value`` is what it stands for itself."""

    name: str
    make: Callable[[tuple[Any, ...]], Any] | None = None
    value: Any = None


def shown(name: str) -> str:
    """A name out of a file, on one line and not too long."""
    return name if name.isascii() and name.isprintable() and len(name) <= 100 else ascii(name[:100])


class PickleReader:
    """Reads the pickles that lie in a span, one after another.

    Args:
        span: where they lie.
        file: open on the span's source, at the first byte of the first pickle; left after the last that was read.
        admitted: ``module.name`` -> what it stands for.
        persistent: what a persistent id stands for; None where there are none.
        budget: what is left for the file.
    """

    def __init__(
        self,
        span: Span,
        file: BufferedIOBase,
        admitted: Mapping[str, Admitted],
        persistent: Callable[[Any], Any] | None,
        budget: Budget,
    ) -> None:
        self._span = span
        self._file = file
        self._admitted = admitted
        self._persistent = persistent
        self._budget = budget
        self._at = file.tell() - span.start
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    @property
    def position(self) -> int:
        """Of the next byte, in the span."""
        return self._at

    def load(self) -> Any:
        """The value of the next pickle. Raises CheckpointError for anything that is not plain data."""
        self._stack, self._marks, self._memo = [], [], {}
        if self._take(1) != b"\x80" or self._take(1)[0] not in _PROTOCOLS:
            raise CheckpointError(f"expected a pickle of protocol {_PROTOCOLS[0]} to {_PROTOCOLS[-1]}")
        while (opcode := self._take(1)[0]) != ord("."):
            self._budget.spend(opcodes=1)
            execute = _EXECUTE.get(opcode)
            if execute is None:
                name = _OPCODE_NAMES.get(opcode, "unknown")
                raise CheckpointError(f"its pickle holds the opcode {opcode:#04x} ({name}), which is not admitted")
            execute(self)
        value = self._pop()
        if self._stack or self._marks:
            raise CheckpointError("its pickle ends with values left over")
        return value

    def skip(self, size: int) -> Span:
        """The next ``size`` bytes, which belong to no pickle."""
        span = self._span.part(self._at, size)
        self._at += size
        self._file.seek(size, 1)
        return span

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The next bytes as :mod:`struct` understands ``layout``."""
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _take(self, size: int) -> bytes:
        if size > self._span.size - self._at:
            self._span.part(self._at, size)
        self._at += size
        content = self._file.read(size)
        if len(content) != size:
            raise CheckpointError("the file changed while it was being read")
        return content

    def _pop(self) -> Any:
        if not self._stack:
            raise CheckpointError("its pickle takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise CheckpointError("its pickle takes from an empty stack")
        return self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError("its pickle has no mark where one is needed")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _frame(self) -> None:
        (size,) = self.unpack("<Q")
        self._span.part(self._at, size)

    def _number(self, layout: str) -> None:
        self._push(self.unpack(layout)[0])

    def _long(self, layout: str) -> None:
        (size,) = self.unpack(layout)
        if not 0 <= size <= _MAX_INT_BYTES:
            raise CheckpointError(f"its pickle holds an integer of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _text(self, layout: str) -> None:
        (size,) = self.unpack(layout)
        self._budget.spend(text=min(size, self._span.size))
        try:
            self._push(self._take(size).decode())
        except UnicodeDecodeError as error:
            raise CheckpointError("its pickle holds text that is not UTF-8") from error

    def _string(self) -> None:
        """A short text of Python 2, which told text and bytes not apart."""
        (size,) = self.unpack("<B")
        self._budget.spend(text=size)
        self._push(self._take(size).decode("latin-1"))

    def _bytes(self, layout: str) -> None:
        self._push(self.skip(self.unpack(layout)[0]))

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise CheckpointError("its pickle appends to what is no list")
        target.extend(items)

    def _add(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise CheckpointError("its pickle adds to what is no set")
        target.update(map(_key, items))

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise CheckpointError("its pickle sets items of what is no dictionary")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _append_one(self) -> None:
        self._append([self._pop()])

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise CheckpointError(f"its pickle refers to its memo's entry {index}, which is not there")
        self._push(self._memo[index])

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError("its pickle names something by what is no text")
        entry = self._admitted.get(f"{module}.{name}")
        if entry is None:
            raise CheckpointError(
                f"its pickle asks for {shown(f'{module}.{name}')}, which is not admitted; nothing ran"
            )
        self._push(entry if entry.value is None else entry.value)

    def _global_lines(self) -> None:
        lines = []
        for _ in range(2):
            line = self._file.readline(min(_MAX_LINE, self._span.size - self._at))
            self._at += len(line)
            if not line.endswith(b"\n"):
                raise CheckpointError("its pickle holds a name without an end")
            lines.append(line[:-1].decode("latin-1"))
        self._global(*lines)

    def _stack_global(self) -> None:
        name = self._pop()
        self._global(self._pop(), name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Admitted) or function.make is None:
            raise CheckpointError(f"its pickle calls what cannot be called, a {type(function).__name__}")
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"its pickle calls {function.name} with what is no tuple")
        for argument in arguments:  # what is made may be as large, at every call with the same argument
            if isinstance(argument, list):
                self._budget.spend(opcodes=len(argument))
            elif isinstance(argument, str):
                self._budget.spend(text=len(argument))
        self._push(function.make(arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, dict) and isinstance(state, dict):
            return  # attributes of a subclass of dict, such as a state dict's _metadata
        build: Callable[[Any], None] | None = getattr(target, "build", None)
        if build is None:
            raise CheckpointError(f"its pickle gives a state to what has none, a {type(target).__name__}")
        build(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise CheckpointError("its pickle holds a persistent id where there is none")
        self._push(self._persistent(self._pop()))


def _key(value: Any) -> Any:
    """Keys are plain: a tuple of tuples of tuples would be hashed by recursion, without an end.

    Integers are hashed modulo 2^61 - 1: larger ones may all have one hash, and a dictionary of n take n^2 steps.
    """
    if not isinstance(value, str | int | float | None):
        raise CheckpointError(f"its pickle uses a {type(value).__name__} as a key")
    if isinstance(value, int) and abs(value) >= _MAX_KEY:
        raise CheckpointError(f"its pickle uses the integer {value} as a key")
    return value


_EXECUTE: dict[int, Callable[[PickleReader], None]] = {
    0x95: PickleReader._frame,
    ord("("): PickleReader._mark,
    ord("N"): lambda r: r._push(None),
    0x88: lambda r: r._push(True),
    0x89: lambda r: r._push(False),
    ord("J"): lambda r: r._number("<i"),
    ord("K"): lambda r: r._number("<B"),
    ord("M"): lambda r: r._number("<H"),
    ord("G"): lambda r: r._number(">d"),
    0x8A: lambda r: r._long("<B"),
    0x8B: lambda r: r._long("<i"),
    0x8C: lambda r: r._text("<B"),
    ord("X"): lambda r: r._text("<I"),
    0x8D: lambda r: r._text("<Q"),
    ord("U"): PickleReader._string,
    ord("T"): lambda r: r._bytes("<i"),  # a long string of Python 2: an array's bytes
    ord("C"): lambda r: r._bytes("<B"),
    ord("B"): lambda r: r._bytes("<I"),
    0x8E: lambda r: r._bytes("<Q"),
    0x96: lambda r: r._bytes("<Q"),
    ord(")"): lambda r: r._push(()),
    0x85: lambda r: r._tuple(1),
    0x86: lambda r: r._tuple(2),
    0x87: lambda r: r._tuple(3),
    ord("t"): lambda r: r._push(tuple(r._to_mark())),
    ord("]"): lambda r: r._push([]),
    ord("a"): PickleReader._append_one,
    ord("e"): lambda r: r._append(r._to_mark()),
    ord("}"): lambda r: r._push({}),
    ord("s"): PickleReader._set_one,
    ord("u"): lambda r: r._set(r._to_mark()),
    0x8F: lambda r: r._push(set()),
    0x90: lambda r: r._add(r._to_mark()),
    0x91: lambda r: r._push(set(map(_key, r._to_mark()))),
    ord("q"): lambda r: r._put(*r.unpack("<B")),
    ord("r"): lambda r: r._put(*r.unpack("<I")),
    0x94: lambda r: r._put(len(r._memo)),
    ord("h"): lambda r: r._get(*r.unpack("<B")),
    ord("j"): lambda r: r._get(*r.unpack("<I")),
    ord("c"): PickleReader._global_lines,
    0x93: PickleReader._stack_global,
    ord("R"): PickleReader._reduce,
    0x81: PickleReader._reduce,  # NEWOBJ: a class and its arguments
    ord("b"): PickleReader._build,
    ord("Q"): PickleReader._persistent_id,
}
