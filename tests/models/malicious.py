"""Files that a reader of weights must refuse: they would run code, claim what is not there, or are something else.

``python -m tests.models.malicious DIRECTORY`` writes them all. Code in them would write the file that the environment
variable ``CTM_FAST_CANARY`` names.
"""

import io
import pickle
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ctm_fast.models.published.torch_files import LEGACY_START
from tests.models.published_files import save_edm, save_legacy, save_tar, save_zip

COMMAND = 'echo run > "$CTM_FAST_CANARY"'
_HUGE = 2**62
_STORED = zipfile.ZIP_STORED


@dataclass(frozen=True)
class Case:
    """The bytes of a file, and what the refusal says (a regular expression)."""

    content: Callable[[], bytes]
    message: str


# Opcodes, as pickletools names them.


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(*parts: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def storage_id(kind: bytes = name("torch", "FloatStorage"), key: str = "0", numel: int = 4) -> bytes:
    return many(text("storage"), kind, text(key), text("cpu"), number(numel)) + b"Q"


def tensor(storage: bytes | None = None, size: int = 4, stride: int = 1, offset: int = 0) -> bytes:
    """A call of _rebuild_tensor_v2 for a vector."""
    arguments = (
        number(offset),
        many(number(size)),
        many(number(stride)),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage_id() if storage is None else storage, *arguments)


def archive(
    data: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    more: dict[str, bytes] | None = None,
    compress: tuple[str, ...] = (),
) -> bytes:
    """The zip archive of torch.save with ``data`` as its pickle."""
    entries = {"a/data.pkl": data, "a/byteorder": b"little", "a/version": b"3\n"}
    entries |= {f"a/data/{key}": value for key, value in (storages or {"0": bytes(16)}).items()} | (more or {})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for entry, content in entries.items():
            file.writestr(entry, content, zipfile.ZIP_DEFLATED if entry in compress else _STORED)
    return buffer.getvalue()


def weights(value: bytes) -> bytes:
    """A zip archive whose dictionary holds ``value`` as its only tensor."""
    return archive(pickled(dictionary(weight=value), protocol=2))


def legacy(data: bytes, keys: list[str], storages: bytes = b"") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    rest = (pickle.dumps(1001, 2), pickle.dumps(system, 2), data, pickle.dumps(keys, 2))
    return LEGACY_START + b"".join(rest) + storages


def legacy_tensor(numel: int) -> bytes:
    kind = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(numel), b"N")
    return pickled(dictionary(weight=tensor(many(*kind) + b"Q", size=numel)), protocol=2)


def tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_of(**members: bytes) -> bytes:
    system = pickle.dumps({"little_endian": True}, 2)
    contents = {"sys_info": system, "storages": b"", "tensors": b"", "pickle": b"", **members}
    return tar([(tarfile.TarInfo(entry), content) for entry, content in contents.items()])


def edm(state: bytes, class_name: str = "EDMPrecond", kind: str = "class", key: str = "ema") -> bytes:
    """A pickle of EDM's, of one object with that state."""
    reconstruct = name("torch_utils.persistence", "_reconstruct_persistent_obj")
    source = text("import os; os.system(" + repr(COMMAND) + ")")
    record = dictionary(type=text(kind), version=b"K\x06", module_src=source, class_name=text(class_name), state=state)
    return pickled(dictionary(**{key: call(reconstruct, record)}))


def written(save: Callable[..., None], *arguments: Any, **options: Any) -> bytes:
    """What ``save(tensors, path, ...)`` writes for a small network's tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ("map_layer0.weight", "enc.8x8_conv.weight", "enc.8x8_conv.bias", "dec.8x8_block0.conv0.weight")
        tensors = {f"model.{entry}": torch.randn(6, 4) for entry in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive"
        save(tensors, path, *arguments, **options)
        return path.read_bytes()


META = {
    "network": {"model_type": "SongUNet", "model_channels": 4, "channel_mult": [1], "num_blocks": 1},
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 0,
    "sigma_data": 0.5,
}


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new) and old in content
    return content.replace(old, new)


def _reduces(function: Callable[..., Any], *arguments: Any) -> bytes:
    """What pickle writes for an object whose __reduce__ returns that."""
    evil = type("Evil", (), {"__reduce__": lambda self: (function, arguments)})
    return pickle.dumps({"ema": evil()}, 4)


def _twice_in_the_directory() -> bytes:
    """Two entries of different names over the same bytes: a bomb without compression."""
    content = archive(pickled(dictionary(weight=tensor()), protocol=2), {"0": bytes(16), "1": bytes(16)})
    start = content.index(b"PK\x01\x02")
    first, second = (content.index(entry, start) - 4 for entry in (b"a/data/0", b"a/data/1"))
    return content[:second] + content[first : first + 4] + content[second + 4 :]


def _repeated() -> bytes:
    data = pickled(dictionary(weight=tensor()), protocol=2)
    return changed(archive(data, {"0": bytes(16), "1": bytes(16)}), b"a/data/1", b"a/data/0")


def _directory(field: slice, value: int) -> bytes:
    """An archive with a field of its end record (22 bytes) or of its first directory entry changed."""
    content = bytearray(weights(tensor()))
    content[field] = value.to_bytes(len(content[field]), "little")
    return bytes(content)


def _encrypted() -> bytes:
    content = bytearray(weights(tensor()))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def _says_compressed() -> bytes:
    content = bytearray(weights(tensor()))
    content[content.index(b"PK\x01\x02") + 10] = zipfile.ZIP_DEFLATED
    return bytes(content)


def _claims_size(size: int) -> bytes:
    content = bytearray(weights(tensor()))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", size, size)
    return bytes(content)


def _damaged() -> bytes:
    return changed(archive(pickled(dictionary(weight=tensor())), {"0": b"0123456789abcdef"}), b"6789", b"6780")


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(4))
    return buffer.getvalue()


def _object_array() -> bytes:
    return pickle.dumps({"ema": np.array([{}], dtype=object)}, 4)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _optimizer() -> bytes:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.RAdam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return _saved(optimizer.state_dict())


def _script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _quantized() -> bytes:
    return _saved({"weight": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)})


def _loop() -> bytes:
    """A module's own dictionary of modules is filled after the module is there: with itself."""
    reconstruct = name("torch_utils.persistence", "_reconstruct_persistent_obj")
    record = dictionary(type=text("class"), class_name=text("EDMPrecond"), state=dictionary(_modules=b"}q\x00"))
    top = call(reconstruct, record) + b"q\x01"
    return pickled(b"}" + text("ema") + top + b"s" + text("loop") + b"h\x00" + text("model") + b"h\x01s" + b"s")


def _doubling_modules() -> bytes:
    """Each module holds the one before twice: 2^30 tensors in 3 kB."""
    module = b"}q\x00"
    for i in range(30):
        record = dictionary(type=text("class"), class_name=text("Block"), state=dictionary(_modules=module))
        made = call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), record) + b"q" + bytes([i + 1])
        module = dictionary(a=made, b=b"h" + bytes([i + 1]))
    return edm(dictionary(_modules=module))


def _doubling_arguments() -> bytes:
    """[[...], [...]] forty deep, each list holding the one before twice: 2^40 values in 300 bytes."""
    lists = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(40))
    state = dictionary(_init_kwargs=dictionary(channel_mult=b"](]q\x00" + lists + b"e"))
    record = dictionary(type=text("class"), class_name=text("SongUNet"), state=state)
    network = call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), record)
    return edm(dictionary(_modules=dictionary(model=network)))


def _deep_key() -> bytes:
    """A tuple in a tuple in a tuple ... as a key: hashing it would overflow the stack of C."""
    return pickled(b"}" + b")" + b"\x85" * 100_000 + b"Ns")


def _nested_legacy(evil: bytes) -> bytes:
    inner = legacy(evil, [])
    argument = b"B" + struct.pack("<I", len(inner)) + inner
    return pickled(dictionary(ema=call(name("torch.storage", "_load_from_bytes"), argument)))


def _many_loads() -> bytes:
    """The same bytes as a storage again and again: each time is work."""
    kind = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(0), b"N")
    inner = legacy(pickled(many(*kind) + b"Q", protocol=2), ["0"], struct.pack("<q", 0))
    load = name("torch.storage", "_load_from_bytes")
    argument = b"B" + struct.pack("<I", len(inner)) + inner + b"q\x00"
    again = b"".join(load + b"h\x00\x85R" for _ in range(100_000))
    return pickled(b"](" + load + argument + b"\x85R" + again + b"e")


def _encoded_again() -> bytes:
    """A text of a MiB as bytes 3,000 times: each time a MiB more."""
    encode, arguments = name("_codecs", "encode") + b"q\x00", text("x" * 2**20) + text("latin1") + b"\x86q\x01"
    return pickled(b"](" + encode + arguments + b"h\x00h\x01R" * 3_000 + b"e", protocol=2)


def _set_again() -> bytes:
    """A list of 50,000 numbers as a set 3,000 times: each time 2 MiB more."""
    items = b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(50_000)) + b"e\x85q\x01"
    return pickled(b"](" + name("builtins", "set") + b"q\x00" + items + b"h\x00h\x01R" * 3_000 + b"e", protocol=2)


def _array(*shape: int) -> bytes:
    """A numpy array of that shape and four bytes."""
    kind = call(name("numpy", "dtype"), text("f4"), b"K\x00", b"K\x01")
    sizes = many(*map(number, shape))
    return pickled(
        dictionary(ema=call(name("numpy.core.numeric", "_frombuffer"), b"C\x04abcd", kind, sizes, text("C")))
    )


def _many_names() -> bytes:
    whole = {f"model.map_layer0.{i}": tensor(storage_id(numel=25_000), size=25_000) for i in range(40)}
    return archive(pickled(dictionary(**whole), protocol=2), {"0": bytes(100_000)})


def _evil(function: bytes = name("os", "system")) -> bytes:
    return call(function, text(COMMAND))


_CANNOT = ", which is not admitted; nothing ran"
CASES: dict[str, Case] = {
    # Names that would run something.
    "os.system": Case(lambda: pickled(_evil(), protocol=2), f"asks for os.system{_CANNOT}"),
    "posix.system, as pickle writes it": Case(
        lambda: _reduces(__import__("os").system, COMMAND), f"asks for posix.system{_CANNOT}"
    ),
    "os.system by STACK_GLOBAL": Case(
        lambda: pickled(text("os"), text("system"), b"\x93", many(text(COMMAND)), b"R"), f"asks for os.system{_CANNOT}"
    ),
    "os.system in a zip archive": Case(lambda: archive(pickled(_evil(), protocol=2)), f"asks for os.system{_CANNOT}"),
    "os.system among the tensors": Case(lambda: weights(_evil()), f"asks for os.system{_CANNOT}"),
    "os.system in the legacy format": Case(lambda: legacy(pickled(_evil(), protocol=2), []), "asks for os.system"),
    "os.system in a tar archive": Case(
        lambda: tar_of(
            storages=pickle.dumps(0, 2) + pickle.dumps([], 2),
            tensors=pickle.dumps(0, 2),
            pickle=pickled(_evil(), protocol=2),
        ),
        "asks for os.system",
    ),
    "os.system in a storage's bytes": Case(lambda: _nested_legacy(pickled(_evil())), f"asks for os.system{_CANNOT}"),
    "os.system in an EDM object": Case(lambda: edm(dictionary(x=_evil())), f"asks for os.system{_CANNOT}"),
    "eval": Case(lambda: pickled(_evil(name("builtins", "eval"))), "asks for builtins.eval"),
    "exec of Python 2": Case(lambda: pickled(_evil(name("__builtin__", "execfile"))), "asks for __builtin__.execfile"),
    "subprocess": Case(lambda: pickled(_evil(name("subprocess", "Popen"))), "asks for subprocess.Popen"),
    "chain of __reduce__ by getattr": Case(
        lambda: pickled(call(call(name("builtins", "getattr"), name("os", "path"), text("os")), text(COMMAND))),
        "asks for builtins.getattr",
    ),
    "functools.partial": Case(lambda: pickled(_evil(name("functools", "partial"))), "asks for functools.partial"),
    "a pickle in the pickle": Case(
        lambda: pickled(call(name("_pickle", "loads"), b"C\x01.")), "asks for _pickle.loads"
    ),
    "torch.load": Case(lambda: pickled(_evil(name("torch", "load"))), "asks for torch.load"),
    "dotted name through an admitted module": Case(
        lambda: pickled(text("torch._utils"), text("_rebuild_tensor_v2.__globals__"), b"\x93", b")R"),
        "asks for torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "a name of two lines": Case(
        lambda: pickled(text("os\nerror: fine"), text("system\x1b[2J"), b"\x93"),
        r"asks for 'os\\nerror: fine.system\\x1b",
    ),
    "a name without an end": Case(lambda: pickled(b"c" + b"o" * 5000), "a name without an end"),
    "a name that is a number": Case(lambda: pickled(b"K\x01K\x02\x93"), "by what is no text"),
    "INST": Case(lambda: pickled(b"(" + text(COMMAND) + b"ios\nsystem\n"), r"opcode 0x69 \(INST\)"),
    "OBJ": Case(lambda: pickled(b"(" + name("collections", "OrderedDict") + b"o"), r"opcode 0x6f \(OBJ\)"),
    "EXT1": Case(lambda: pickled(b"\x82\x01"), r"opcode 0x82 \(EXT1\)"),
    "NEWOBJ_EX": Case(lambda: pickled(name("collections", "OrderedDict") + b")}\x92"), r"opcode 0x92 \(NEWOBJ_EX\)"),
    "an opcode that does not exist": Case(lambda: pickled(b"\xfe"), r"opcode 0xfe \(unknown\)"),
    "text of protocol 0": Case(lambda: b"cos\nsystem\n(S'true'\ntR.", "got none of them"),
    "attributes set on a class": Case(
        lambda: pickled(name("collections", "OrderedDict") + dictionary(__setstate__=b"N") + b"b"),
        "gives a state to what has none",
    ),
    "attributes set on a storage's type": Case(
        lambda: pickled(name("torch", "FloatStorage") + dictionary(itemsize=b"N") + b"b"),
        "gives a state to what has none",
    ),
    "a state on a list": Case(lambda: pickled(b"]" + b"}b"), "gives a state to what has none"),
    "two states of one module": Case(
        lambda: pickled(name("torch.nn.modules.container", "ModuleDict") + b")\x81}b}b"), "the state of a container"
    ),
    "a class whose name clears the screen": Case(
        lambda: edm(b"}K\x01Ns", class_name="a\n\x1b[2Jb"), r"the state of a 'a\\n\\x1b\[2Jb' is no dictionary"
    ),
    "a record that is no class": Case(lambda: edm(b"}", kind="function"), "arguments that do not fit"),
    "a call of a tensor": Case(lambda: weights(tensor() + b")R"), "calls what cannot be called"),
    "a call of a type": Case(lambda: weights(call(name("torch", "FloatStorage"))), "calls what cannot be called"),
    "a call of a name that is there to be an argument": Case(
        lambda: pickled(call(name("numpy", "ndarray"), b"K\x01")), "calls what cannot be called"
    ),
    "a call without a tuple": Case(
        lambda: pickled(name("collections", "OrderedDict") + b"]R"),
        "calls collections.OrderedDict with what is no tuple",
    ),
    # Persistent ids.
    "a module's persistent id": Case(
        lambda: archive(pickled(many(text("module"), text("os"), text("a.py"), text("import os")) + b"Q")),
        "a persistent id that is no storage's",
    ),
    "a persistent id within one": Case(
        lambda: archive(pickled(storage_id(kind=storage_id()))), "a persistent id that is no storage's"
    ),
    "a persistent id in a plain pickle": Case(lambda: pickled(storage_id()), "a persistent id where there is none"),
    "a storage that is not there": Case(
        lambda: weights(tensor(storage_id(key="../data.pkl"))), r"storage ../data.pkl is not in the archive"
    ),
    "a storage of two types": Case(
        lambda: weights(many(storage_id(), storage_id(name("torch", "IntStorage")))), "has two descriptions"
    ),
    # Sizes that are not there.
    "integer of 2 GB": Case(lambda: pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)), "an integer of 2147483647 bytes"),
    "integer of negative size": Case(lambda: pickled(b"\x8b" + struct.pack("<i", -1)), "an integer of -1 bytes"),
    "bytes of 2^62": Case(
        lambda: pickled(b"\x8e" + struct.pack("<Q", _HUGE)), "truncated: expected 4611686018427387904"
    ),
    "bytearray of 2^62": Case(lambda: pickled(b"\x96" + struct.pack("<Q", _HUGE)), "truncated: expected"),
    "text of 2^62": Case(lambda: pickled(b"\x8d" + struct.pack("<Q", _HUGE)), "truncated: expected"),
    "text of 4 GB": Case(lambda: pickled(b"X" + struct.pack("<I", 2**32 - 1)), "truncated: expected 4294967295"),
    "string of Python 2 of 2 GB": Case(
        lambda: pickled(b"T" + struct.pack("<i", 2**31 - 1)), "truncated: expected 2147483647"
    ),
    "string of Python 2 of negative size": Case(lambda: pickled(b"T" + struct.pack("<i", -1)), "expected -1 bytes"),
    "short string of Python 2 past the end": Case(lambda: pickled(b"U\xff"), "truncated: expected 255"),
    "os.system named by Python 2": Case(
        lambda: pickled(call(name("os", "system"), b"U" + bytes([len(COMMAND)]) + COMMAND.encode())),
        "asks for os.system, which is not admitted; nothing ran",
    ),
    "frame of 2^62": Case(lambda: pickled(b"\x95" + struct.pack("<Q", _HUGE)), "truncated: expected"),
    "memo index of 2^32": Case(lambda: pickled(b"Nr" + b"\xff" * 4), "expected a dictionary, got a NoneType"),
    "memo entry that is not there": Case(lambda: pickled(b"j" + b"\xff" * 4), "memo's entry 4294967295"),
    "a million opcodes": Case(
        lambda: pickled(b"](" + b"\x8f" * 1_000_000 + b"e"), "larger than that of any file of weights"
    ),
    "the same storage 100,000 times": Case(_many_loads, "larger than that of any file of weights"),
    "one text encoded 3,000 times": Case(_encoded_again, "larger than that of any file of weights"),
    "one list made a set 3,000 times": Case(_set_again, "larger than that of any file of weights"),
    "text of 70 MB": Case(lambda: pickled(text("x" * 70_000_000)), "larger than that of any file of weights"),
    "tensor of 10^9 elements": Case(
        lambda: weights(tensor(size=10**9)), r"\[1000000000\] is larger than its storage of 4"
    ),
    "one storage under 40 names": Case(_many_names, "its tensors together are larger than the file, many times over"),
    "one element 10^9 times": Case(lambda: weights(tensor(size=10**9, stride=0)), "larger than its storage"),
    "storage of 10^12 elements": Case(
        lambda: weights(tensor(storage_id(numel=10**12), size=10**12)),
        "of 1000000000000 elements of 4 bytes lies in 16",
    ),
    "storage of -4 elements": Case(lambda: weights(tensor(storage_id(numel=-4), size=0)), "of -4 elements"),
    "legacy storage of 10^9 elements": Case(
        lambda: legacy(legacy_tensor(10**9), ["0"], struct.pack("<q", 10**9)), "truncated: expected 4000000000 bytes"
    ),
    "legacy storage of another size": Case(
        lambda: legacy(legacy_tensor(4), ["0"], struct.pack("<q", -4) + bytes(16)), "4 elements lies where -4 are"
    ),
    "legacy storages without an end": Case(
        lambda: legacy(legacy_tensor(4), ["0"] * 9), "list of storages is not that of"
    ),
    "tar of 10^9 storages": Case(
        lambda: tar_of(storages=pickle.dumps(10**9, 2)), "count of storages or tensors is none"
    ),
    "tar's storage of 2^61 elements": Case(
        lambda: tar_of(
            storages=pickle.dumps(1, 2)
            + pickled(many(number(1), text("cpu"), name("torch", "FloatStorage")))
            + struct.pack("<q", 2**61)
        ),
        "truncated: expected",
    ),
    "tensor of negative stride": Case(lambda: weights(tensor(size=2, stride=-1, offset=3)), "is negative, too large"),
    "tensor of negative offset": Case(lambda: weights(tensor(offset=-1)), "is negative, too large or no integer"),
    "tensor of size 2^63": Case(lambda: weights(tensor(size=2**63)), "is negative, too large or no integer"),
    "tensor whose end overflows": Case(lambda: weights(tensor(size=3, stride=2**62)), r"leaves its storage of 4"),
    "tensor of a size that is text": Case(
        lambda: weights(
            call(name("torch._utils", "_rebuild_tensor"), storage_id(), b"K\x00", many(text("4")), many(b"K\x01"))
        ),
        "is negative, too large or no integer",
    ),
    "tensor that leaves its storage": Case(lambda: weights(tensor(offset=1)), "leaves its storage of 4 elements"),
    "tensor of sizes without strides": Case(
        lambda: weights(call(name("torch._utils", "_rebuild_tensor"), storage_id(), b"K\x00", many(b"K\x04"), b")")),
        "1 sizes and 0 strides",
    ),
    "quantized tensor": Case(_quantized, "asks for torch._utils._rebuild_qtensor"),
    "sparse tensor": Case(
        lambda: _saved({"weight": torch.eye(3).to_sparse()}), "asks for torch._utils._rebuild_sparse_tensor"
    ),
    "complex tensor": Case(
        lambda: _saved({"weight": torch.zeros(3, dtype=torch.complex64)}), "torch.ComplexFloatStorage"
    ),
    "float8 tensor": Case(
        lambda: _saved({"weight": torch.zeros(3).to(torch.float8_e4m3fn)}), "asks for torch.+Storage|_rebuild_tensor_v3"
    ),
    "numpy array of objects": Case(_object_array, "a numpy type that is none of"),
    "numpy array that is larger than its bytes": Case(
        lambda: changed(pickle.dumps({"ema": np.zeros(300, np.float32)}, 4), b"M,\x01\x85", b"M\xff\xff\x85"),
        "a storage of 65535 elements of 4 bytes lies in 1200 bytes",
    ),
    "numpy array of a size with 7,600 digits": Case(lambda: _array(*[2**126] * 200), "shape is no tuple of sizes"),
    "numpy array of a size with 1,200 digits": Case(
        lambda: _array(*[2**62] * 64), r"a storage of '\d{100}' elements of 4 bytes lies in 4"
    ),
    "numpy array of strides with 1,200 digits": Case(
        lambda: _array(*[2**62] * 63, 0),
        r"a tensor of shape '\[4611686018427387904, .*, whose strides no integer|lies in 4",
    ),
    "big-endian numpy array": Case(lambda: pickle.dumps({"ema": np.zeros(3, ">f4")}, 4), "big-endian or structured"),
    # Archives.
    "zip bomb as a storage": Case(
        lambda: archive(pickled(dictionary(weight=tensor())), {"0": bytes(10**7)}, compress=("a/data/0",)),
        "entry a/data/0 is compressed or encrypted",
    ),
    "zip bomb as the pickle": Case(
        lambda: archive(pickled(b"N" * 10**6), compress=("a/data.pkl",)), "entry a/data.pkl is compressed or encrypted"
    ),
    "zip entry that says it is compressed": Case(_says_compressed, "is compressed or encrypted"),
    "encrypted zip": Case(_encrypted, "is compressed or encrypted"),
    "zip entries over the same bytes": Case(_twice_in_the_directory, "entries a/data/0 and a/data/1 overlap"),
    "zip of 50,000 entries": Case(
        lambda: archive(pickled(b"N"), {str(i): b"" for i in range(50_000)}), "a zip archive whose directory has"
    ),
    "zip entry twice": Case(_repeated, "two entries a/data/0"),
    "zip entry with a path": Case(
        lambda: archive(pickled(b"N"), more={"../../etc/passwd": b"x"}), "entry ../../etc/passwd, a path out of it"
    ),
    "zip entry with an absolute path": Case(lambda: archive(pickled(b"N"), more={"/a": b"x"}), "entry /a, a path out"),
    "zip entry of 4 GB": Case(lambda: _claims_size(2**32 - 2), "truncated: expected 4294967294 bytes"),
    "zip directory of 4 GB": Case(lambda: _directory(slice(-10, -6), 2**32 - 2), "not a complete zip archive"),
    "zip directory elsewhere": Case(lambda: _directory(slice(-6, -2), 2**31), "truncated: expected 30 bytes at -"),
    "damaged zip": Case(_damaged, "damaged: the checksum of its entry a/data/0 is another"),
    "zip without a pickle": Case(_npz, "with 0 entries NAME/data.pkl"),
    "big-endian zip": Case(
        lambda: archive(pickled(b"}"), more={"a/byteorder": b"big"}), "its numbers are not little-endian"
    ),
    "TorchScript": Case(_script, "a TorchScript archive, which holds code"),
    "tar with a link": Case(
        lambda: tar([(_link("storages", "/etc/passwd"), b"")]), "an entry that is no file: storages"
    ),
    "tar with a path": Case(lambda: tar([(tarfile.TarInfo("../evil"), b"x")]), r"an entry ../evil too many"),
    "tar of 100,000 headers": Case(
        lambda: (_header("a", tarfile.XHDTYPE) * 100_000).ljust(10**4, b"\0"), "without an entry sys_info"
    ),
    "tar without its pickle": Case(lambda: tar([(tarfile.TarInfo("storages"), b"x")]), "without an entry sys_info"),
    "tar entry of 8 GB": Case(
        lambda: changed(tar_of(), b"%011o" % 0, b"7" * 11), "truncated: expected 8589934591 bytes|damaged"
    ),
    # Shapes of values that would take for ever.
    "a module in itself": Case(_loop, "is in two places, or in itself"),
    "modules that double thirty times": Case(_doubling_modules, "is in two places, or in itself"),
    "arguments that double forty times": Case(_doubling_arguments, "more arguments than any has"),
    "a key 100,000 tuples deep": Case(_deep_key, "uses a tuple as a key"),
    "keys of one hash": Case(
        lambda: pickled(b"}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 150_000)) + b"u"),
        "uses the integer 2305843009213693951 as a key",
    ),
    "a list as a key": Case(lambda: pickled(b"}]Ns"), "uses a list as a key"),
    "a value taken from nothing": Case(lambda: pickled(b"R"), "takes from an empty stack"),
    "a tuple without a mark": Case(lambda: pickled(b"t"), "has no mark"),
    "values left over": Case(lambda: pickled(b"NN"), "ends with values left over"),
    "text that is not UTF-8": Case(lambda: pickled(b"\x8c\x02\xff\xfe"), "not UTF-8"),
    # Other things.
    "empty": Case(lambda: b"", "got none of them"),
    "text": Case(lambda: b"weights, honestly\n" * 50, "got none of them"),
    "protocol 200": Case(lambda: b"\x80\xc8.", "expected a pickle of protocol 2 to 5"),
    "truncated pickle": Case(lambda: written(save_edm, META)[:-200], "truncated: expected"),
    "truncated zip": Case(lambda: written(save_zip)[:-40], "not a complete zip archive"),
    "truncated legacy": Case(lambda: written(save_legacy)[:-1], "truncated: expected"),
    "truncated tar": Case(lambda: written(save_tar)[:1700], "truncated: expected|without an entry"),
    "longer pickle": Case(lambda: written(save_edm, META) + b"N.", "2 bytes follow what should be its end"),
    "longer legacy": Case(lambda: written(save_legacy) + b"x", "1 bytes follow what should be its end"),
    "a whole module": Case(lambda: _saved(nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear"),
    "an optimizer": Case(_optimizer, "expected a dictionary of tensors, got state, a dict"),
    "a dictionary of numbers": Case(lambda: _saved({"step": 3}), "expected a dictionary of tensors, got step, a int"),
    "an empty dictionary": Case(lambda: _saved(OrderedDict()), "expected a dictionary of tensors"),
    "names that are paths": Case(lambda: _saved({"../a": torch.ones(1)}), "expected names of tensors, got ../a"),
    "another network": Case(lambda: _saved({"conv.weight": torch.ones(1)}), "no network that is known"),
    "EDM2": Case(lambda: written(save_edm, META, precond="Precond", conv="MPConv"), r"of EDM2 \(MPConv, Precond\)"),
    "EDM2, told by its wrapper alone": Case(lambda: written(save_edm, META, precond="Precond"), r"of EDM2 \(Precond\)"),
    "other preconditioning": Case(lambda: written(save_edm, META, precond="VPPrecond"), "got VPPrecond of SongUNet"),
    "an EDM object without modules": Case(lambda: edm(b"}"), "got EDMPrecond of nothing"),
    "an EDM object with text as a weight": Case(
        lambda: edm(dictionary(_parameters=dictionary(weight=text("x")))), "weight is no tensor, but a str"
    ),
    "truncated safetensors": Case(
        lambda: safetensors_bytes({"model.map_layer0.weight": torch.ones(9)})[:-1], "not a complete .safetensors"
    ),
    "safetensors with a header of 5 MB": Case(
        lambda: safetensors_bytes({"a": torch.ones(9)}, {"a": "x" * 5_000_000}), "a header of 5000"
    ),
    "safetensors of another network": Case(lambda: safetensors_bytes({"a": torch.ones(9)}), "no network that is known"),
}


def _header(entry: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(entry)
    info.type = kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def _link(entry: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(entry)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def write(directory: Path) -> dict[str, Path]:
    """Write all of them; the paths by the names of the cases."""
    paths = {}
    for index, (case, made) in enumerate(CASES.items()):
        paths[case] = directory / f"{index:03d}.pt"
        paths[case].write_bytes(made.content())
    return paths


if __name__ == "__main__":
    for label, path in write(Path(sys.argv[1])).items():
        print(path, label)
