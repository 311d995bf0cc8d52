"""Tar archives of strangers: nothing is unpacked, and what is no plain file is refused by name."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ctm_fast.errors import DataError

_BLOCK = 512
_CHUNK = 2**20
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def plain_members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in ``tar``, in order; what follows the last is read to the end.

    Raises DataError naming a member that is a link, a device, sparse, or whose name leads out of the archive; or where
    the archive stops before its end.
    """
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = _KINDS.get(member.type, "of a kind not known")
            raise DataError(f"data: {path}: expected plain files, got {member.name!r}, {kind}")
        if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
            raise DataError(f"data: {path}: expected names inside the archive, got {member.name!r}")
        yield member
    # tarfile takes a damaged header for the end. Compressed archives are checked only once they are read to theirs.
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"data: cannot read {path}: expected a header or the end at byte {tar.offset}, got neither")
    while file.read(_CHUNK):
        pass
