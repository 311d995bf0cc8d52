"""Files that others publish: read exactly, in every format, without running any of what pickles may hold."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.features.weights import read_weights
from ctm_fast.models.published import read_published
from tests.command_line import tree
from tests.golden import Golden
from tests.memory import peak
from tests.models import malicious
from tests.models.published_files import HOSTILE_SOURCE, save_edm, save_legacy, save_tar, save_zip

ROOT = Path(__file__).parent.parent.parent
EDM = "edm/edm_ddpmpp_cond.npz"
SAVE: dict[str, Callable[[Mapping[str, Tensor], Path], None]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "tar": save_tar,
    "safetensors": lambda tensors, path: save_file({k: t.contiguous() for k, t in tensors.items()}, path),
}


def _assert_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(tensors) == sorted(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("name", ["cifar/net_ddpmpp_cond.npz", EDM])
@pytest.mark.parametrize("kind", SAVE)
def test_network(kind: str, name: str, tmp_path: Path) -> None:
    tensors = Golden(name).tensors("w")
    SAVE[kind](tensors, tmp_path / "a")
    read = read_published(tmp_path / "a")
    _assert_same(read.tensors, tensors)
    assert read.config is None
    publisher = "NVlabs/edm" if name == EDM else "Kim-Dongjun/ctm-cifar10"
    assert read.publisher == publisher
    assert publisher in read.licence
    assert "not for commercial use" in read.licence


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm(protocol: int, tmp_path: Path) -> None:
    golden = Golden(EDM)
    save_edm(golden.tensors("w"), tmp_path / "a.pkl", golden.meta, protocol=protocol)
    assert HOSTILE_SOURCE.encode() in (tmp_path / "a.pkl").read_bytes()
    read = read_published(tmp_path / "a.pkl")
    _assert_same(read.tensors, golden.tensors("w"))
    assert read.config is not None
    assert read.config.pop("precond") == "EDMPrecond"
    assert golden.meta.pop("precond").startswith("EDMPrecond")
    assert read.config["network"].pop("label_dropout") == 0  # that of the class: none was given
    assert read.config == golden.meta
    assert "CC BY-NC-SA 4.0" in read.licence


def test_edm_that_leaves_out_what_is_usual(tmp_path: Path) -> None:
    golden = Golden(EDM)
    network = {key: golden.meta["network"][key] for key in ("model_type", "model_channels", "channel_mult")}
    save_edm(golden.tensors("w"), tmp_path / "a.pkl", {**golden.meta, "network": network})
    config = read_published(tmp_path / "a.pkl").config
    assert config is not None
    assert config["network"]["channel_mult"] == [1, 2]
    assert config["network"]["num_blocks"] == 4
    assert config["network"]["attn_resolutions"] == [16]


@pytest.mark.parametrize(
    ("name", "publisher"),
    [
        ("time_embed_s.0.weight", "sony/ctm"),
        ("time_embed.0.weight", "openai/consistency_models"),
        ("model.map_layer0_s.weight", "Kim-Dongjun/ctm-cifar10"),
        ("model.map_layer0.weight", "NVlabs/edm"),
    ],
)
def test_publisher(name: str, publisher: str, tmp_path: Path) -> None:
    others = {name.replace("_s.", "."): torch.ones(1), name: torch.ones(1)}
    torch.save(others, tmp_path / "a.pt")
    read = read_published(tmp_path / "a.pt")
    assert read.publisher == publisher
    assert publisher in read.licence
    assert ("not for commercial use" in read.licence) == (publisher != "openai/consistency_models")


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
def test_dtypes(kind: str, dtype: torch.dtype, tmp_path: Path, generator: torch.Generator) -> None:
    if dtype == torch.bool:
        values = torch.randint(2, (3, 5), generator=generator).bool()
    elif dtype.is_floating_point:
        values = torch.randn(3, 5, generator=generator).to(dtype)
    else:
        values = torch.randint(0, 127, (3, 5), generator=generator).to(dtype)
    tensors = {"map_layer0.weight": values, "a": torch.zeros((), dtype=dtype), "b": torch.zeros(0, 2, dtype=dtype)}
    SAVE[kind](tensors, tmp_path / "a")
    _assert_same(read_published(tmp_path / "a").tensors, tensors)


@pytest.mark.parametrize("kind", ["zip", "legacy", "tar"])
def test_views(kind: str, tmp_path: Path) -> None:
    """Tensors that share a storage, and strides, are read as they are; only what a tensor spans is."""
    flat = torch.arange(240.0)
    tensors = {
        "map_layer0.weight": flat[:120].view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "map_layer1.weight": flat[120:].view(10, 12).t(),
        "tail": flat[230:],
        "every third": flat[1:50:3],
    }
    tensors["every_third"] = tensors.pop("every third")
    SAVE[kind](tensors, tmp_path / "a")
    read = read_published(tmp_path / "a").tensors
    _assert_same(read, tensors)
    for name, tensor in tensors.items():
        assert read[name].stride() == tensor.stride(), name
    assert read["tail"].untyped_storage().nbytes() == 40


def test_parameters_and_attributes(tmp_path: Path) -> None:
    """What a module's state_dict has besides: its _metadata; and parameters that were saved as such."""
    layer = torch.nn.Linear(3, 2)
    state = torch.nn.ModuleDict({"map_layer0": layer}).state_dict()
    assert isinstance(state, OrderedDict) and hasattr(state, "_metadata")
    torch.save(state, tmp_path / "a.pt")
    torch.save({"map_layer0.weight": layer.weight, "map_layer0.bias": layer.bias}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        _assert_same(read_published(tmp_path / name).tensors, {k: v.detach() for k, v in state.items()})


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_numpy(dtype: Any, protocol: int, tmp_path: Path) -> None:
    arrays = {"map_layer0.weight": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones((0, 3), dtype)}
    arrays["fortran"] = np.asfortranarray(np.arange(12).reshape(3, 4).astype(dtype))
    with (tmp_path / "a.pkl").open("wb") as file:
        pickle.dump({"ema": arrays, "step": np.float64(3), "seed": np.int32(3)}, file, protocol)
    _assert_same(
        read_published(tmp_path / "a.pkl").tensors, {name: torch.from_numpy(array) for name, array in arrays.items()}
    )


def test_entry(tmp_path: Path) -> None:
    tensors = {"map_layer0.weight": torch.ones(2)}
    torch.save({"ema": {"map_layer0.weight": torch.zeros(2)}, "net": tensors, "step": 3}, tmp_path / "a.pt")
    assert read_published(tmp_path / "a.pt").tensors["map_layer0.weight"].tolist() == [0, 0]
    assert read_published(tmp_path / "a.pt", entry="net").tensors["map_layer0.weight"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="expected an entry 'model', got ema, net, step"):
        read_published(tmp_path / "a.pt", entry="model")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, got a int"):
        read_published(tmp_path / "a.pt", entry="step")


def test_safetensors_metadata(tmp_path: Path) -> None:
    tensors = {"map_layer0.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "a", metadata={"config": '{"arch": "ddpmpp"}', "licence": "mine"})
    read = read_published(tmp_path / "a")
    assert (read.config, read.licence) == ({"arch": "ddpmpp"}, "mine")
    for config in ("{", "[1]", "[" * 10**5):
        save_file(tensors, tmp_path / "a", metadata={"config": config})
        with pytest.raises(CheckpointError, match="the configuration in its metadata is no"):
            read_published(tmp_path / "a")


def test_sha256(tmp_path: Path) -> None:
    save_zip({"map_layer0.weight": torch.ones(2)}, tmp_path / "a.pt")
    known = subprocess.run(["sha256sum", tmp_path / "a.pt"], capture_output=True, text=True, check=True).stdout[:64]
    assert read_published(tmp_path / "a.pt").sha256 == known


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_zip({"map_layer0.weight": torch.ones(2)}, path)
    tensors = read_published(path).tensors
    os.utime(path, (0, 0))  # another file of the same size, as far as one can see
    with pytest.raises(CheckpointError, match=r"a.pt: map_layer0.weight: the file changed"):
        tensors["map_layer0.weight"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"a.pt: map_layer0.weight: the file changed"):
        tensors["map_layer0.weight"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a.pt: map_layer0.weight: .*No such file"):
        tensors["map_layer0.weight"]


def test_places(tmp_path: Path) -> None:
    for path, got in ((tmp_path / "none", "no such file"), (tmp_path, "a directory")):
        with pytest.raises(CheckpointError, match=f"expected a file, got {got}"):
            read_published(path)
    with pytest.raises(CheckpointError, match="too long"):
        read_published(tmp_path / ("x" * 300))


def _python(code: str, path: Path, **variables: str) -> str:
    """What a fresh interpreter prints that runs ``code`` with ``path`` as its argument, in the directory above it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=environment, cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# What is refused.


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", malicious.CASES)
def test_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("CTM_FAST_CANARY", str(canary))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.pt"
    path.write_bytes(malicious.CASES[case].content())
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=malicious.CASES[case].message) as error:
        read_published(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable(), "one line, without escapes"
    assert len(str(error.value)) < 400
    assert tree(tmp_path) == before


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", malicious.CASES)
def test_feature_networks_refuse_them_too(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is refused for, one of a state dict of other names is; nothing in it is run."""
    monkeypatch.setenv("CTM_FAST_CANARY", str(tmp_path / "canary"))
    path = tmp_path / "a.pt"
    path.write_bytes(malicious.CASES[case].content())
    with pytest.raises(CheckpointError) as error:
        read_weights(path, {"conv.weight": (3, 3)})
    assert str(error.value).startswith(f"{path}: ")
    assert not (tmp_path / "canary").exists()


def test_the_canary_sings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pickle.load and torch.load do run the files: the cases are no straw men."""
    monkeypatch.setenv("CTM_FAST_CANARY", str(tmp_path / "canary"))
    for case in ("os.system", "posix.system, as pickle writes it", "os.system by STACK_GLOBAL"):
        pickle.loads(malicious.CASES[case].content())
        (tmp_path / "canary").unlink()
    (tmp_path / "a.pt").write_bytes(malicious.CASES["os.system in a zip archive"].content())
    torch.load(tmp_path / "a.pt", weights_only=False)
    (tmp_path / "canary").unlink()


WATCHED = """
import encodings.cp437, json, os, resource, sys
from pathlib import Path
from ctm_fast.errors import CheckpointError
from ctm_fast.models.published import read_published

watching = False
RUNS = ("os", "subprocess", "exec", "compile", "import", "pickle", "socket", "ctypes")

def watch(event, arguments):
    if watching and event.split(".")[0] in RUNS:
        raise SystemExit(f"{event} {arguments}")
    if watching and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(watch)
here = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
most = int(here.split()[1]) * 1024 + 192 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
refused = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    watching = True
    try:
        read_published(path)
    except CheckpointError as error:
        refused[path.name] = str(error)
    watching = False
print(json.dumps(refused))
"""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.torch.jit:DeprecationWarning")
def test_refused_under_watch(tmp_path: Path) -> None:
    """All of them in 192 MiB besides what torch takes, without an import, a compilation, a command, a written file."""
    (tmp_path / "in").mkdir()
    paths = malicious.write(tmp_path / "in")
    refused = json.loads(_python(WATCHED, tmp_path / "in", CTM_FAST_CANARY=str(tmp_path / "canary")))
    assert sorted(refused) == sorted(path.name for path in paths.values())
    for case, path in paths.items():
        assert re.search(malicious.CASES[case].message, refused[path.name]), case
        path.unlink()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "in"]
    assert not list((tmp_path / "in").iterdir())


def test_memory(tmp_path: Path) -> None:
    """Reading a file takes the memory of the tensors that are held, not that of the file."""
    tensors = {f"map_layer{i}.weight": torch.full((2**20,), float(i)) for i in range(24)}  # 96 MiB
    for kind in ("zip", "legacy"):
        SAVE[kind](tensors, tmp_path / kind)
    save_edm(
        {f"model.enc.8x8_block{i}.weight": tensor for i, tensor in enumerate(tensors.values())}
        | {"model.map_layer0.weight": torch.ones(1)},
        tmp_path / "edm",
        malicious.META,
    )
    del tensors
    code = """
read = read_published(sys.argv[1])
assert sum(float(tensor.sum()) for tensor in read.tensors.values()) > 2**20 * 270
"""
    for kind in ("zip", "legacy", "edm"):
        taken = peak(code, tmp_path / kind, cwd=tmp_path, before="from ctm_fast.models.published import read_published")
        assert taken < 98304 / 2, f"{kind}: {taken} KiB for a file of 98304"


# Fuzz: whatever is done to a valid file, it is read or refused.


@dataclass(frozen=True)
class Change:
    """One change of a file; positions are parts of its length."""

    kind: str
    at: float
    other: float
    value: int
    content: bytes

    def apply(self, content: bytes) -> bytes:
        at, other = int(self.at * len(content)), int(self.other * len(content))
        match self.kind:
            case "flip":
                return (
                    content[:at] + bytes([content[at] ^ (1 << self.value % 8)]) + content[at + 1 :] if content else b""
                )
            case "cut":
                return content[:at]
            case "drop":
                return content[: min(at, other)] + content[max(at, other) :]
            case "splice":
                return content[:at] + content[other : other + self.value % 300] + content[at:]
            case "insert":
                return content[:at] + self.content + content[at:]
            case "number":
                width = (1, 2, 4, 8)[self.value % 4]
                return content[:at] + struct.pack("<Q", self.value)[:width] + content[at + width :]
        raise AssertionError(self.kind)


OPCODES = [bytes([code]) for code in b"().0NJKMGXBCUTIL]aets}ubRciohjqrQ1"] + [
    bytes([code]) for code in range(0x80, 0x99)
]
EDGES = [2**bits + step for bits in (0, 7, 8, 15, 16, 31, 32, 62, 63) for step in (-1, 0, 1)]
CHANGES = st.builds(
    Change,
    kind=st.sampled_from(["flip", "flip", "cut", "drop", "splice", "insert", "number", "number"]),
    at=st.floats(0, 1, exclude_max=True),
    other=st.floats(0, 1),
    value=st.one_of(st.sampled_from(EDGES), st.integers(0, 2**64 - 1)),
    content=st.one_of(
        st.sampled_from(OPCODES), st.lists(st.sampled_from(OPCODES), max_size=6).map(b"".join), st.binary()
    ),
)


def _in_an_archive(content: bytes) -> bytes:
    """A changed pickle with the right checksum, so that it is read."""
    return malicious.archive(content, {"0": bytes(96)})


def _zip_pickle() -> bytes:
    parts = {f"model.map_layer{i}.weight": malicious.tensor(malicious.storage_id(numel=24), 5, 2, i) for i in range(4)}
    return malicious.pickled(malicious.dictionary(**parts), protocol=2)


VALID: dict[str, tuple[Callable[[], bytes], Callable[[bytes], bytes]]] = {
    "zip": (lambda: malicious.written(save_zip), bytes),
    "pickle of a zip": (_zip_pickle, _in_an_archive),
    "legacy": (lambda: malicious.written(save_legacy), bytes),
    "tar": (lambda: malicious.written(save_tar), bytes),
    "edm": (lambda: malicious.written(save_edm, malicious.META), bytes),
    "edm, protocol 2": (lambda: malicious.written(save_edm, malicious.META, protocol=2), bytes),
    "safetensors": (lambda: malicious.written(SAVE["safetensors"]), bytes),
}
"""A valid file, and what makes a file of what came of it."""


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    return {kind: make() for kind, (make, _) in VALID.items()}


@pytest.mark.parametrize("kind", VALID)
def test_valid(kind: str, valid: dict[str, bytes], tmp_path: Path) -> None:
    """What the fuzz starts from is read."""
    (tmp_path / "a").write_bytes(VALID[kind][1](valid[kind]))
    assert len(read_published(tmp_path / "a").tensors) == 4


def _fuzz(kind: str, changes: list[Change], valid: dict[str, bytes], folder: Path) -> None:
    content = valid[kind]
    for change in changes:
        content = change.apply(content)
    path = folder / "a.pt"
    path.write_bytes(VALID[kind][1](content))
    message = ""
    try:
        for tensor in read_published(path).tensors.values():
            assert tensor.untyped_storage().nbytes() <= len(content) + 96
    except CheckpointError as error:
        message = str(error)
    assert not message or message.startswith(f"{path}: ")
    assert message.isprintable()
    assert list(folder.iterdir()) == [path]


FUZZ = {
    "kind": st.sampled_from(list(VALID)),
    "changes": st.lists(CHANGES, min_size=1, max_size=4),
}
_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=150, derandomize=True, database=None, **_QUIET)  # type: ignore[arg-type]
@given(**FUZZ)
def test_fuzz(kind: str, changes: list[Change], valid: dict[str, bytes], tmp_path: Path) -> None:
    _fuzz(kind, changes, valid, tmp_path)


@pytest.mark.long
@settings(max_examples=6000, database=None, **_QUIET)  # type: ignore[arg-type]
@given(**FUZZ)
def test_fuzz_long(kind: str, changes: list[Change], valid: dict[str, bytes], tmp_path: Path) -> None:
    _fuzz(kind, changes, valid, tmp_path)
