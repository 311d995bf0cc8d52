"""Both archives of CIFAR-10 are read exactly; nothing in the pickles runs; broken and foreign archives are refused."""

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_fast.data import load_dataset
from ctm_fast.errors import DataError
from tests.data.forms import cifar_batches, cifar_pickle, write_cifar, write_tar
from tests.models.malicious import call, name, text

PIXELS = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 10, 18)
FORMS = ("python", "binary")


def archive(folder: Path, form: str, changed: dict[str, bytes | None] | None = None) -> Path:
    """The archive, with other contents for the members whose names end so, or without them."""
    members = cifar_batches(PIXELS, LABELS, form)
    for ending, content in (changed or {}).items():
        (full,) = [member for member in members if member.endswith(ending)]
        if content is None:
            del members[full]
        else:
            members[full] = content
    return write_cifar(folder / f"cifar-10-{form}.tar.gz", members)


def test_the_writer_of_these_tests_writes_what_python_2_reads_and_wrote():
    """And the first bytes are those of the published data_batch_1."""
    data = PIXELS[:3].reshape(3, -1)
    written = cifar_pickle(data, [6, 9, 4])
    batch = pickle.loads(written, encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], data)
    assert batch[b"labels"] == [6, 9, 4]
    published = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\tK\x04"
    )
    assert written.startswith(published)


@pytest.mark.parametrize("form", FORMS)
def test_batches_in_their_order(tmp_path, form):
    path = archive(tmp_path, form)
    train = load_dataset(path, resolution=32, channels=3, labels=True)
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), PIXELS[:15])
    assert train.labels.tolist() == LABELS[:15].tolist()
    assert train.name == f"cifar-10-{form}"
    assert train.images.is_contiguous()
    test = load_dataset(path, resolution=32, labels=True, split="test")
    np.testing.assert_array_equal(test.images.permute(0, 2, 3, 1).numpy(), PIXELS[15:])
    assert test.labels.tolist() == LABELS[15:].tolist()
    assert load_dataset(path, resolution=32, labels=False).labels is None


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_that_python_3_wrote(tmp_path, protocol):
    data = PIXELS[:3].transpose(0, 3, 1, 2).reshape(3, -1)
    content = pickle.dumps({"data": data, "labels": [1, 2, 3]}, protocol)
    path = archive(tmp_path, "python", {"test_batch": content})
    read = load_dataset(path, resolution=32, labels=True, split="test")
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1).numpy(), PIXELS[:3])
    assert read.labels.tolist() == [1, 2, 3]


# What is refused

DATA = PIXELS[:3].reshape(3, -1)
PICKLES: dict[str, tuple[bytes, str]] = {
    "os.system": (
        cifar_pickle(DATA, [1, 2, 3], extra=text("x") + call(name("posix", "system"), text("touch ran"))),
        "its pickle asks for posix.system, which is not admitted; nothing ran$",
    ),
    "eval in place of numpy": (
        cifar_pickle(DATA, [1, 2, 3]).replace(b"cnumpy.core.multiarray\n_reconstruct\n", b"cbuiltins\neval\n"),
        "asks for builtins.eval, which is not admitted; nothing ran$",
    ),
    "a tensor, which weights may hold": (
        cifar_pickle(DATA, [1, 2, 3], extra=text("x") + name("torch._utils", "_rebuild_tensor_v2")),
        "asks for torch._utils._rebuild_tensor_v2, which is not admitted",
    ),
    "an array larger than its bytes": (
        cifar_pickle(DATA, [1, 2, 3]).replace(b"K\x03M" + struct.pack("<H", 3072), b"K\x04M" + struct.pack("<H", 3072)),
        "'cifar-10-batches-py/test_batch': .*12288",
    ),
    "a string past the end": (cifar_pickle(DATA, [1, 2, 3])[:-3000], "truncated: expected"),
    "an array of floats": (
        cifar_pickle(DATA.astype(np.float32), [1, 2, 3]),
        r"expected data uint8 \[N, 3072\], got float32",
    ),
    "rows of another length": (cifar_pickle(DATA[:, :3071], [1, 2, 3]), r"got uint8 \[3, 3071\]"),
    "fewer labels": (cifar_pickle(DATA, [1, 2]), "^labels: .*expected a list of 3 integers$"),
    "a list": (b"\x80\x02].", r"expected data uint8 \[N, 3072\], got no array"),
    "no pickle": (b"hello", "expected a pickle of protocol 2 to 5"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = PICKLES[case]
    path = archive(tmp_path, "python", {"test_batch": content})
    with pytest.raises(DataError, match=message) as error:
        load_dataset(path, resolution=32, labels=True, split="test")
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_malicious_pickle_would_have_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLES["os.system"][0], encoding="bytes")
    assert (tmp_path / "ran").exists()


def test_missing_and_doubled_batches(tmp_path):
    path = archive(tmp_path, "binary", {"data_batch_3.bin": None})
    with pytest.raises(DataError, match=r"expected CIFAR-10's data_batch_1, .*, got no data_batch_3, but 'cifar-10-"):
        load_dataset(path, resolution=32, labels=True)
    load_dataset(path, resolution=32, labels=True, split="test")
    members = cifar_batches(PIXELS, LABELS, "binary")
    path = write_tar(tmp_path / "a.tar.gz", [*members.items(), *members.items()], "w:gz")
    with pytest.raises(DataError, match="expected each batch once, got data_batch_1 again"):
        load_dataset(path, resolution=32, labels=True)


def test_cifar_100_is_another_set(tmp_path):
    path = write_tar(tmp_path / "cifar-100-binary.tar.gz", [("cifar-100-binary/train.bin", bytes(3074))], "w:gz")
    with pytest.raises(DataError, match=r"got no data_batch_1, .*, but 'cifar-100-binary/train.bin'"):
        load_dataset(path, resolution=32, labels=True)


def test_binary_batch_of_no_whole_number_of_records(tmp_path):
    path = archive(tmp_path, "binary", {"test_batch.bin": bytes(2 * 3073 + 5)})
    with pytest.raises(DataError, match="expected records of 3073 bytes, got 5 over after 2"):
        load_dataset(path, resolution=32, labels=True, split="test")


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (link("/etc/passwd"), "expected plain files, got 'cifar-10-batches-bin/test_batch.bin', a symbolic link"),
        (link("../a", tarfile.LNKTYPE), "a hard link"),
        (link("", tarfile.FIFOTYPE), "a pipe"),
        (link("", tarfile.CHRTYPE), "a device"),
        ("../data_batch_1.bin", "expected names inside the archive, got '../data_batch_1.bin'"),
        ("a/../../data_batch_1.bin", "expected names inside the archive"),
        ("/tmp/data_batch_1.bin", "expected names inside the archive, got '/tmp/data_batch_1.bin'"),
    ],
)
def test_members_refused(tmp_path, member, message):
    path = write_tar(tmp_path / "a.tar.gz", [(member, b"")], "w:gz")
    with pytest.raises(DataError, match=message):
        load_dataset(path, resolution=32, labels=True)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_and_flipped(tmp_path, form):
    """Refused in one line, or the very data: gzip's checksum is looked at."""
    path = archive(tmp_path, form)
    content = path.read_bytes()
    whole = load_dataset(path, resolution=32, labels=True).images
    generator = np.random.default_rng(2)
    broken = [content[:length] for length in generator.integers(0, len(content), 15)]
    for place in generator.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        broken.append(bytes(flipped))
    refused = 0
    for wrong in broken:
        path.write_bytes(wrong)
        try:
            read = load_dataset(path, resolution=32, labels=True)
        except DataError:
            refused += 1
            continue
        assert torch.equal(read.images, whole)
    assert refused > 60


def test_a_batch_that_claims_too_much(tmp_path):
    info = tarfile.TarInfo("data_batch_1.bin")
    info.size = 2**40
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf()))
    with pytest.raises(DataError, match="expected at most 268435456 bytes, got 1099511627776"):
        load_dataset(path, resolution=32, labels=True)
