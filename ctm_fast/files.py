"""Files that are whole or absent, whenever the process is killed; what is checked before, and which file it was."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from ctm_fast.errors import ConfigError


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write(file)`` write ``path``: readers see the former content or all of the new, never a part.

    The bytes go to a hidden temporary name in the same directory (a rename is atomic only within a file system), reach
    the disk, and take the name. If ``write`` raises, ``path`` is as it was and nothing is left behind; after a SIGKILL
    a file ``.NAME.PID.tmp`` may be.

    Raises OSError where the directory does not exist or cannot be written to, and whatever ``write`` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on disk once its directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: str | Path, text: str) -> None:
    """:func:`atomic_write` of a text, in UTF-8."""
    atomic_write(path, lambda file: file.write(text.encode()))


def check_output(name: str, path: Path, suffix: str, *, sources: Sequence[Path] = (), of: str = "SRC") -> None:
    """Raise ConfigError naming the option unless a file can be written to ``path``: before work of hours, not after.

    Args:
        name: of the option or argument.
        path: what is to be written.
        suffix: that it must have, with the dot.
        sources: files that are read and must not be written over.
        of: what the message calls them.
    """
    if path.suffix != suffix:
        raise ConfigError(f"{name}: expected a {suffix}, got {path}")
    if path.is_dir():
        raise ConfigError(f"{name}: expected a file, got a folder: {path}")
    if not can_write_in(path.parent):
        raise ConfigError(f"{name}: expected a place in a directory that can be written to, got {path}")
    if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
        raise ConfigError(f"{name}: expected a file other than {of}, got {path}")


def can_write_in(directory: Path) -> bool:
    """Whether it is a directory in which files can be made. It is tried: permissions do not tell, above all root's."""
    try:
        with tempfile.TemporaryFile(dir=directory, prefix="."):
            return True
    except OSError:
        return False


def file_sha256(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
