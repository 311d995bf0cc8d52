"""A file is written whole or not at all, also when the process is killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ctm_fast
from ctm_fast.errors import ConfigError
from ctm_fast.files import atomic_write, can_write_in, check_output, file_sha256


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second"):
        atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_leaves_everything_as_it_was(tmp_path):
    def fail(file):
        file.write(b"half")
        raise RuntimeError("in the middle")

    path = tmp_path / "a.bin"
    path.write_bytes(b"former")
    for target in (path, tmp_path / "new.bin"):
        with pytest.raises(RuntimeError, match="in the middle"):
            atomic_write(target, fail)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"former"


def test_readers_see_the_former_file_until_the_new_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"former")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"former"

    atomic_write(path, write)
    assert path.read_bytes() == b"new"


def test_no_such_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "a.bin", lambda file: file.write(b"x"))
    assert not list(tmp_path.iterdir())


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"x")
    atomic_write(tmp_path / "atomic", lambda file: file.write(b"x"))
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITER = """
import sys
from ctm_fast.errors import ConfigError
from ctm_fast.files import atomic_write, can_write_in, check_output, file_sha256
def write(file):
    for _ in range(64):
        file.write(content)
for i in range(10**9):
    content = bytes([i % 251]) * 65536
    atomic_write(sys.argv[1], write)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_any_moment(tmp_path):
    """Every time the file is 4 MiB of one value."""
    path = tmp_path / "a.bin"
    package = str(Path(ctm_fast.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    for delay in (0.0, 0.003, 0.011, 0.024):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=environment)
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 64 * 65536
        assert len(set(content)) == 1


def test_where_a_file_can_be_written(tmp_path):
    (tmp_path / "a.npz").touch()
    (tmp_path / "link.npz").symlink_to("a.npz")
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.iterdir())
    check_output("--out", tmp_path / "new.npz", ".npz", sources=[tmp_path / "a.npz", tmp_path / "none"])
    check_output("--out", tmp_path / "a.npz", ".npz")
    for name, message in (
        ("a.png", "--out: expected a .npz, got "),
        ("folder.npz", "--out: expected a file, got a folder: "),
        ("none/a.npz", "--out: expected a place in a directory that can be written to, got "),
        ("a.npz/b.npz", "--out: expected a place in a directory that can be written to, got "),
        ("/proc/a.npz", "--out: expected a place in a directory that can be written to, got "),
        ("link.npz", "--out: expected a file other than the data, got "),
    ):
        path = tmp_path / name
        with pytest.raises(ConfigError) as caught:
            check_output("--out", path, ".npz", sources=[tmp_path / "a.npz"], of="the data")
        assert str(caught.value) == f"{message}{path}"
    assert can_write_in(tmp_path)
    assert not can_write_in(tmp_path / "a.npz")
    assert sorted(tmp_path.iterdir()) == before


def test_sha256(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"content")
    assert file_sha256(tmp_path / "a.bin") == hashlib.sha256(b"content").hexdigest()
