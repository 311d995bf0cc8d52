"""What ``torch.save`` wrote, read as data: zip archives (torch 1.6 and later), the format before it, and tar (2017)."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from io import BufferedIOBase
from typing import Any

import torch

from ctm_fast.errors import CheckpointError
from ctm_fast.models.published.names import ADMITTED
from ctm_fast.models.published.pickles import Admitted, Budget, PickleReader, shown
from ctm_fast.models.published.spans import Span
from ctm_fast.models.published.tensors import MAX_DIMENSIONS, STORAGE_TYPES, Storage, StoredTensor

_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\n" + _MAGIC.to_bytes(10, "little") + b"."
_LEGACY_PROTOCOL = 1001
_CHUNK = 2**20
_MAX_DIRECTORY = 2**21  # of a zip archive: 16 times that of the largest published file
_MAX_MEMBERS = 16  # of a tar archive, headers of headers included
_BLOCK = 512
_TAR_ENTRIES = ("sys_info", "storages", "tensors", "pickle")


def read_zip(span: Span, budget: Budget) -> Any:
    """The value in a zip archive: entries ``NAME/data.pkl``, ``NAME/data/<key of a storage>``, stored uncompressed."""
    entries = _entries(span)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"a zip archive with {len(pickles)} entries NAME/data.pkl, so not one of torch.save")
    (name,) = pickles
    folder = name.removesuffix("/data.pkl")
    order = entries.get(f"{folder}/byteorder")
    if order is not None and order.part(0, min(order.size, 8)).read() != b"little":
        raise CheckpointError("its numbers are not little-endian")
    storages: dict[str, Storage] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        entry = entries.get(f"{folder}/data/{key}")
        if entry is None:
            raise CheckpointError(f"its storage {shown(key)} is not in the archive")
        known = storages.setdefault(key, Storage(dtype, numel))
        if (known.dtype, known.numel) != (dtype, numel):
            raise CheckpointError(f"its storage {shown(key)} has two descriptions")
        if known.content is None:
            known.place(entry)
        return known

    def persistent(value: Any) -> Storage:
        match value:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)):
                return storage(key, dtype, numel)
        raise CheckpointError("its pickle holds a persistent id that is no storage's")

    return _read_one(entries[name], ADMITTED, persistent, budget)


def _entries(span: Span) -> dict[str, Span]:
    """Name -> bytes of every entry, each within the archive, apart from the others, and as its checksum says."""
    try:
        with span.open() as file, zipfile.ZipFile(_Bounded(file, span.size)) as archive:
            directory, end = archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except Exception as error:  # zipfile lets what it trips over escape: struct.error, UnicodeDecodeError, ...
        raise CheckpointError(f"not a complete zip archive: {type(error).__name__}") from error
    if any(info.filename.endswith("/constants.pkl") for info in directory):
        raise CheckpointError("a TorchScript archive, which holds code")
    entries: dict[str, Span] = {}
    for info in directory:
        name = info.filename
        if name in entries:
            raise CheckpointError(f"a zip archive with two entries {shown(name)}")
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"a zip archive with an entry {shown(name)}, a path out of it")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise CheckpointError(f"a zip archive whose entry {shown(name)} is compressed or encrypted")
        header = span.part(info.header_offset, 30).read()
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"a zip archive without its entry {shown(name)}")
        start = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        )
        entries[name] = span.part(start, info.file_size)
        if start + info.file_size > end:
            raise CheckpointError(f"a zip archive whose entry {shown(name)} reaches into its directory")
    _check_apart(entries)  # before the checksums: over the same bytes, those of all entries would take for ever
    for info in directory:
        if _crc(entries[info.filename]) != info.CRC:
            raise CheckpointError(f"damaged: the checksum of its entry {shown(info.filename)} is another")
    return entries


class _Bounded:
    """What zipfile reads a directory from: it asks for as many bytes as the file says the directory has."""

    def __init__(self, file: BufferedIOBase, size: int) -> None:
        self._file = file
        self._size = size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        wanted = left if size < 0 else min(size, left)
        if wanted > _MAX_DIRECTORY:
            raise CheckpointError(f"a zip archive whose directory has {wanted} bytes")
        return self._file.read(wanted)


def _check_apart(entries: dict[str, Span]) -> None:
    before, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < end:
            raise CheckpointError(f"a zip archive whose entries {shown(before)} and {shown(name)} overlap")
        before, end = name, entry.end


def _crc(span: Span) -> int:
    crc = 0
    with span.open() as file:
        for start in range(0, span.size, _CHUNK):
            crc = zlib.crc32(file.read(min(_CHUNK, span.size - start)), crc)
    return crc


def read_legacy(span: Span, budget: Budget) -> Any:
    """The value in a file of torch before 1.6: pickles, then one after another the storages they name."""
    storages: dict[str, Storage] = {}

    def persistent(value: Any) -> Storage:
        match value:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel), None) if numel >= 0:
                storage = storages.setdefault(key, Storage(dtype, numel))
                if (storage.dtype, storage.numel) != (dtype, numel):
                    raise CheckpointError(f"its storage {shown(key)} has two descriptions")
                return storage
        raise CheckpointError("its pickle holds a persistent id that is no storage's")

    with span.open() as file:
        reader = PickleReader(span, file, ADMITTED, persistent, budget)
        magic, protocol, system = reader.load(), reader.load(), reader.load()
        if (magic, protocol) != (_MAGIC, _LEGACY_PROTOCOL):
            raise CheckpointError("not a file of torch.save")
        _check_little_endian(system)
        value, keys = reader.load(), reader.load()
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(storages):
            raise CheckpointError("its list of storages is not that of the storages it uses")
        for key in keys:
            _place_next(reader, storages[key])
        _check_end(reader, span)
    return value


def read_tar(span: Span, budget: Budget) -> Any:
    """The value in a tar archive: entries ``storages``, ``tensors`` and ``pickle``."""
    members = _members(span)
    _check_little_endian(_read_one(members["sys_info"], ADMITTED, None, budget))
    storages: dict[int, Storage] = {}
    tensors: dict[int, StoredTensor] = {}
    with members["storages"].open() as file:
        reader = PickleReader(members["storages"], file, ADMITTED, None, budget)
        for _ in range(_count(reader.load(), span)):
            match reader.load():
                case (int(key), str(), torch.dtype() as dtype):
                    (numel,) = reader.unpack("<q")
                    storages[key] = Storage(dtype, numel)
                    storages[key].place(reader.skip(numel * dtype.itemsize))
                case _:
                    raise CheckpointError("a storage without a key and a type")
        if reader.load() != []:
            raise CheckpointError("it holds storages that are views of others, which are not admitted")
    with members["tensors"].open() as file:
        reader = PickleReader(members["tensors"], file, _TENSOR_TYPES, None, budget)
        for _ in range(_count(reader.load(), span)):
            match reader.load():
                case (int(key), int(storage), Admitted()) if storage in storages:
                    tensors[key] = _tar_tensor(reader, storages[storage])
                case _:
                    raise CheckpointError("a tensor without a key and a storage")

    def persistent(value: Any) -> StoredTensor:
        match value:
            case str() if value.isdecimal() and len(value) < 21 and int(value) in tensors:
                return tensors[int(value)]
        raise CheckpointError("its pickle holds a persistent id that is no tensor's")

    return _read_one(members["pickle"], ADMITTED, persistent, budget)


def read_raw(span: Span, budget: Budget) -> Any:
    """The value in a plain pickle, each of whose storages is a file of the legacy format in bytes of its own."""

    def load_from_bytes(arguments: tuple[Any, ...]) -> Storage:
        match arguments:
            case (Span() as content,):
                storage = read_legacy(content, budget)
                if isinstance(storage, Storage):
                    return storage
        raise CheckpointError("its pickle calls torch.storage._load_from_bytes with what is no storage")

    name = "torch.storage._load_from_bytes"
    return _read_one(span, {**ADMITTED, name: Admitted(name, load_from_bytes)}, None, budget)


def _read_one(
    span: Span, admitted: Mapping[str, Admitted], persistent: Callable[[Any], Any] | None, budget: Budget
) -> Any:
    with span.open() as file:
        reader = PickleReader(span, file, admitted, persistent, budget)
        value = reader.load()
        _check_end(reader, span)
    return value


def _check_end(reader: PickleReader, span: Span) -> None:
    if reader.position != span.size:
        raise CheckpointError(f"{span.size - reader.position} bytes follow what should be its end")


def _check_little_endian(system: Any) -> None:
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("its numbers are not little-endian")


def _place_next(reader: PickleReader, storage: Storage) -> None:
    """Place ``storage`` where ``reader`` is: its number of elements, then the elements."""
    (numel,) = reader.unpack("<q")
    if numel != storage.numel:
        raise CheckpointError(f"a storage of {storage.numel} elements lies where {numel} are announced")
    storage.place(reader.skip(numel * storage.dtype.itemsize))


_TENSOR_TYPES = {
    name: Admitted(name) for name in ("torch." + storage.replace("Storage", "Tensor") for storage in STORAGE_TYPES)
}


def _tar_tensor(reader: PickleReader, storage: Storage) -> StoredTensor:
    """The sizes, strides and offset that follow a tensor's pickle."""
    dimensions, _ = reader.unpack("<ii")
    if not 0 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(f"a tensor of {dimensions} dimensions")
    size, stride = reader.unpack(f"<{dimensions}q"), reader.unpack(f"<{dimensions}q")
    (offset,) = reader.unpack("<q")
    return StoredTensor(storage, offset, size, stride)


def _members(span: Span) -> dict[str, Span]:
    """The entries by name; each begins with a block of 512 bytes that says its size."""
    members: dict[str, Span] = {}
    at = 0
    for _ in range(_MAX_MEMBERS):
        if at + _BLOCK > span.size:
            break
        header = span.part(at, _BLOCK).read()
        if not any(header):
            break
        name, digits, kind = header[:100].rstrip(b"\0"), header[124:136].strip(b" \0"), header[156:157]
        if header[257:262] != b"ustar" or not digits.isdigit() or b"8" in digits or b"9" in digits:
            raise CheckpointError("damaged: a header of its tar archive is none")
        size = int(digits, 8)
        content = span.part(at + _BLOCK, size)
        if kind in (b"0", b"\0"):
            key = name.decode("latin-1")
            if key not in _TAR_ENTRIES or key in members:
                raise CheckpointError(f"a tar archive with an entry {shown(key)} too many, so not one of torch.save")
            members[key] = content
        elif kind not in (b"x", b"g"):  # more about the next entry, such as its date: nothing that is needed
            raise CheckpointError(f"a tar archive with an entry that is no file: {shown(name.decode('latin-1'))}")
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    missing = [name for name in _TAR_ENTRIES if name not in members]
    if missing:
        raise CheckpointError(f"a tar archive without an entry {missing[0]}, so not one of torch.save")
    return members


def _count(value: Any, span: Span) -> int:
    if type(value) is not int or not 0 <= value <= span.size:
        raise CheckpointError("a tar archive whose count of storages or tensors is none")
    return value
