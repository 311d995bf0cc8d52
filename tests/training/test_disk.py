"""A disk that fills up ends a run with one line and leaves the state before; with room, it goes on to the same."""

import errno
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ctm_fast import train
from ctm_fast.training.run_directory import _write_state
from tests.command_line import call
from tests.disk import mount, small_disk

SETS = "data.conditional=false network.label_dim=0 network.img_resolution=4 network.model_channels=8 "
SETS += "network.channel_mult=1 teacher.steps=6 teacher.batch=4 snapshot_every=2 log_every=1 stages=teacher"
STATE = "state-teacher-000004.pt"  # as large as the one before, which the finished run has no more
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    np.savez(tmp_path / "tiny.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), dtype=np.uint8))
    words = ["--device", "cpu", "--threads", "1", "--data", str(tmp_path / "tiny.npz")]
    words += [word for assignment in SETS.split() for word in ("--set", assignment)]
    return lambda outdir, *more: call(train.main, [*words, "--outdir", str(outdir), *more], monkeypatch, capsys)


def room(run: Path, last: str) -> int:
    """KiB that the files of ``run`` take, in pages of 4, when half of the one named is written and no state is gone."""
    files = sorted((path for path in run.glob("*.*") if path.suffix != ".jsonl"), key=lambda path: path.stat().st_mtime)
    names = [path.name for path in files]
    before = [*files[: names.index(last)], run / "stats.jsonl", *run.glob("samples/teacher-000002*"), run / STATE]
    before += run.glob("samples/teacher-000004*")
    return sum(4 * -(-path.stat().st_size // 4096) for path in before) + (run / last).stat().st_size // 2048


@pytest.mark.parametrize("last", ["snapshot-teacher-000004.safetensors", STATE])
def test_disk_full(last: str, run: Call, tmp_path: Path) -> None:
    assert run(tmp_path / "enough")[0] == 0
    expected, disk = tmp_path / "enough" / "00000-digits", tmp_path / "full"
    disk.mkdir()
    with small_disk(disk, f"{room(expected, last)}k"):
        code, _, err = run(disk)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("error: --outdir: cannot write ") and "No space left on device" in err
        left = disk / "00000-digits"
        assert not [path.name for path in left.rglob("*") if path.name.endswith(".tmp") or path.name == last]
        assert (left / "snapshot-teacher-000004.safetensors").exists() == (last == STATE)
        torch.load(left / "state-teacher-000002.pt", weights_only=True)
        mount("-o", "remount,size=64m", str(disk))
        code, out, err = run(disk)
        assert (code, err) == (0, "") and "going on after step 2 of teacher" in out
        for name in ("snapshot-teacher-000006.safetensors", "samples/teacher-000006.png"):
            assert (left / name).read_bytes() == (expected / name).read_bytes()


class Full(io.RawIOBase):
    """A file on a disk without room."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_state_that_finds_no_room_says_so() -> None:
    """Not what torch.save makes of it, a RuntimeError about positions."""
    with pytest.raises(OSError, match="No space left"):
        _write_state({"weights": torch.zeros(5000)}, io.BufferedWriter(Full()))
