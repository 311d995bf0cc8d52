"""Ranges of bytes in a file: sizes are known and checked without reading, bytes are read when they are needed."""

import os
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path

from ctm_fast.errors import CheckpointError


class Source:
    """What spans lie in: a file, which must stay as it is while its spans are read, or bytes that came out of one."""

    def __init__(self, content: Path | bytes) -> None:
        self._content = content
        self._identity = _identity(content) if isinstance(content, Path) else None

    def open(self) -> BufferedIOBase:
        """The bytes from the start. Raises CheckpointError if the file is no longer what it was."""
        if isinstance(self._content, bytes):
            return BytesIO(self._content)
        if _identity(self._content) != self._identity:
            raise CheckpointError("the file changed while it was being read")
        return self._content.open("rb")

    def span(self) -> "Span":
        """All of it."""
        return Span(self, 0, len(self._content) if isinstance(self._content, bytes) else self._content.stat().st_size)


@dataclass(frozen=True)
class Span:
    """The bytes ``start`` to ``end`` of a source."""

    source: Source
    start: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    def part(self, start: int, size: int) -> "Span":
        """``size`` bytes from ``start`` on. Raises CheckpointError where they are not all inside."""
        if start < 0 or size < 0 or start + size > self.size:
            raise CheckpointError(f"truncated: expected {size} bytes at {self.start + start}, the end is at {self.end}")
        return Span(self.source, self.start + start, self.start + start + size)

    def open(self) -> BufferedIOBase:
        """The source, at the span's first byte."""
        file = self.source.open()
        file.seek(self.start)
        return file

    def read(self) -> bytes:
        """The bytes."""
        with self.open() as file:
            content = file.read(self.size)
        if len(content) != self.size:
            raise CheckpointError("the file changed while it was being read")
        return content

    def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer``, which is as long as the span."""
        with self.open() as file:
            if file.readinto(buffer) != self.size:
                raise CheckpointError("the file changed while it was being read")


def _identity(path: Path) -> tuple[int, ...]:
    stat: os.stat_result = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
