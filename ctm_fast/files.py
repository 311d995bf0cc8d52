"""Files that are whole or absent, whenever the process is killed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
