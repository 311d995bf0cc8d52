"""Models on disk: what is saved is what is loaded, and nothing else is loaded."""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network, checkpoint, load_model, save_model
from ctm_fast.models.checkpoint import FORMAT
from tests.models.small import SMALL

NETWORK = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=3,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.1,
)


def _model(kind: type[CTM] | type[EDMDenoiser], seed: int = 0, network: NetworkConfig = NETWORK) -> CTM | EDMDenoiser:
    """With random weights throughout, also where a new network has zeros."""
    net = build_network(network, s_branch=kind is CTM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return kind(net, 0.7)


@pytest.mark.parametrize("network", [NETWORK, *SMALL.values()], ids=["digits", *SMALL])
@pytest.mark.parametrize("kind", [CTM, EDMDenoiser])
def test_round_trip(kind: type[CTM] | type[EDMDenoiser], network: NetworkConfig, tmp_path: Path) -> None:
    model = _model(kind, network=network).train()
    metadata = {"seed": 3, "config": {"levels": {"sigma_min": 0.002}}, "stage": "ctm"}
    save_model(tmp_path / "a.safetensors", model, network, metadata)
    loaded, got = load_model(tmp_path / "a.safetensors")
    assert got == {"network": network, **metadata}
    assert type(loaded) is kind
    assert loaded.sigma_data == 0.7
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected, weights = model.state_dict(), loaded.state_dict()
    assert list(weights) == list(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype, name
        assert torch.equal(weights[name], tensor), name
        assert weights[name].stride() == tensor.stride(), name  # the memory format too


@pytest.mark.parametrize("kind", [CTM, EDMDenoiser])
def test_convolutions_stay_channels_last(kind: type[CTM] | type[EDMDenoiser], tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", _model(kind), NETWORK)
    loaded, _ = load_model(tmp_path / "a.safetensors")
    weights = [weight for weight in loaded.parameters() if weight.dim() == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_dtype(tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", _model(CTM), NETWORK)
    loaded, _ = load_model(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    x = torch.randn(2, 1, 8, 8)
    t, s = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.0])
    F_x = loaded.raw(x, t, s, torch.tensor([0, 2]))  # type: ignore[operator]
    assert F_x.dtype == torch.bfloat16
    assert loaded(x, t, s, torch.tensor([0, 2])).dtype == torch.float32


def test_failure_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, _model(CTM), NETWORK)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_model(path, _model(CTM), NETWORK, {"a set is no JSON": {1}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# What a file may be instead, as a function of the bytes of a good one.


def _header(change: Callable[[dict[str, str]], object]) -> Callable[[bytes], bytes]:
    """The same tensors under a changed description."""

    def damage(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header["__metadata__"])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return damage


def _network(**sizes: Any) -> Callable[[bytes], bytes]:
    described = {**asdict(NETWORK), **sizes}
    return _header(lambda metadata: metadata.update(network=json.dumps(described)))


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "not a complete .safetensors file"),
    "short": (lambda content: content[:5], "not a complete .safetensors file"),
    "cut in the header": (lambda content: content[:200], "not a complete .safetensors file"),
    "cut in the tensors": (lambda content: content[:-1], "not a complete .safetensors file"),
    "longer": (lambda content: content + b"x", "not a complete .safetensors file"),
    "absurd header length": (lambda content: struct.pack("<Q", 2**62) + content[8:], "not a complete"),
    "header is no JSON": (lambda content: content[:8] + b"\xff" * 8 + content[16:], "not a complete"),
    "text": (lambda content: b"weights, honestly\n" * 9, "not a complete .safetensors file"),
    "pickle": (lambda content: pickle.dumps({"a": 1}), "got a pickle, which is never loaded"),
    "zip": (lambda content: b"PK\x03\x04" + content, "got a pickle, which is never loaded"),
    "no format": (_header(lambda metadata: metadata.pop("format")), "expected format ctm_fast.model.1, got None"),
    "other format": (_header(lambda metadata: metadata.update(format="x")), "expected format .* got 'x'"),
    "no network": (_header(lambda metadata: metadata.pop("network")), "description of the model does not fit"),
    "network is no JSON": (_header(lambda metadata: metadata.update(network="{")), "description"),
    "network is a list": (_header(lambda metadata: metadata.update(network="[1]")), "description"),
    "unknown kind": (_header(lambda metadata: metadata.update(kind="gan")), "description"),
    "sigma_data is a word": (_header(lambda metadata: metadata.update(sigma_data='"x"')), "description"),
    "sigma_data is 0": (_header(lambda metadata: metadata.update(sigma_data="0")), "sigma_data: expected a positive"),
    "metadata is a number": (_header(lambda metadata: metadata.update(metadata="3")), "description"),
    "unknown size": (_network(depth=3), "description"),
    "size is a word": (_network(model_channels="many"), "description"),
    "unknown architecture": (_network(arch="transformer"), "expected one of ddpmpp, .*got 'transformer'"),
    "sizes do not fit together": (_network(channel_mult=[1, 1, 1, 1, 1]), "description"),
    "no levels": (_network(channel_mult=[]), "channel_mult: expected a level at least, got none"),
    "no resolution": (_network(img_resolution=0), "img_resolution: expected an integer from 1 on, got 0"),
    "heads are negative": (_network(head_channels=-4), "head_channels: expected an integer from 0 on, got -4"),
    "dropout is everything": (_network(dropout=1.0), r"dropout: expected 0 <= dropout < 1, got 1\.0"),
    "wider": (_network(model_channels=12), r"another architecture: tensor .* expected float32 \[.*got float32 \["),
    "deeper": (_network(num_blocks=2), "another architecture: tensor .*block1"),
    "shallower": (_network(channel_mult=[1]), "another architecture: tensor .* is not in the network"),
    "enormous": (_network(label_dim=10**12), "another architecture"),  # terabytes if it were built
    "wider than the file is long": (_network(model_channels=10**12), "got 4 blocks and 1000000000000 channels for"),
    "blocks without an end": (_network(num_blocks=10**9), "got 2000000002 blocks and 8 channels for"),
    "levels without an end": (_network(channel_mult=[1] * 10**5), "got 200000 blocks"),
    "teacher that says it is a student": (_header(lambda metadata: metadata.update(kind="ctm")), "_s.* is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, _model(EDMDenoiser), NETWORK)
    damage, message = BAD[case]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read one after another: those of two snapshots must not meet in one model."""
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    check = checkpoint._check_weights

    def replaced(*arguments: Any) -> None:
        check(*arguments)
        other.replace(path)

    monkeypatch.setattr(checkpoint, "_check_weights", replaced)
    for content in (None, b"x"):
        save_model(path, _model(EDMDenoiser), NETWORK)
        save_model(other, _model(EDMDenoiser, seed=1), NETWORK)
        if content:
            other.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: the file changed while it was being read"):
            load_model(path)


def test_refused_student_as_teacher(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_model(path, _model(CTM), NETWORK)
    path.write_bytes(_header(lambda metadata: metadata.update(kind="edm"))(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"_s.* is not in the network"):
        load_model(path)


def test_refused_somebody_elses(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"expected format {FORMAT}, got None"):
        load_model(tmp_path / "a.safetensors")


def test_refused_other_dtype(tmp_path: Path) -> None:
    """Silently widened weights would hide that they are not those that were trained."""
    path = tmp_path / "a.safetensors"
    save_model(path, _model(EDMDenoiser), NETWORK)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"expected float32 .* got float16"):
        load_model(path)


def test_refused_pickle_is_not_run(tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
            return Path.touch, (tmp_path / "it ran",)

    for name, save in (("a.pkl", lambda path: path.write_bytes(pickle.dumps(Run()))), ("a.pt", _torch_save(Run()))):
        save(tmp_path / name)
        with pytest.raises(CheckpointError, match="never loaded"):
            load_model(tmp_path / name)
    assert not (tmp_path / "it ran").exists()


def _torch_save(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def test_refused_places(tmp_path: Path) -> None:
    for path, got in ((tmp_path / "none", "no such file"), (tmp_path, "a directory")):
        with pytest.raises(CheckpointError, match=f"got {got}"):
            load_model(path)
    with pytest.raises(CheckpointError, match="not a complete"):
        load_model(tmp_path / ("x" * 300))


@pytest.mark.parametrize("first", [b"PK", b"\x80\x02"])
def test_header_length_that_looks_like_a_pickle(first: bytes, tmp_path: Path) -> None:
    """The length of the header comes first, and may be any number: 19280 reads "PK"."""
    path = tmp_path / "a.safetensors"
    length = int.from_bytes(first + b"\0\0\0\0\0\0", "little")
    network = replace(NETWORK, channel_mult=(1,), attn_resolutions=())
    save_model(path, EDMDenoiser(build_network(network, s_branch=False), 0.5), network)
    content = path.read_bytes()
    (there,) = struct.unpack("<Q", content[:8])
    while length < there:
        length += 65536
    path.write_bytes(struct.pack("<Q", length) + content[8 : 8 + there].ljust(length) + content[8 + there :])
    assert path.read_bytes()[:2] == first
    assert isinstance(load_model(path)[0], EDMDenoiser)
