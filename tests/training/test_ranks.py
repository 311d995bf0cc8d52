"""Training on several ranks is training on one: gradients, weights, saves, and what they do not put up with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctm_fast.distributed import Ranks, all_mean, average_gradients, together
from ctm_fast.errors import ConfigError, DataError, UserError
from ctm_fast.training import RunConfig, override, preset, train
from ctm_fast.training.execution import Execution
from tests.ranks import in_ranks
from tests.training.naive import gradients
from tests.training.test_ctm_options import BASE, Maps, draw, steps

STEPS = 20
SETTINGS = (
    "data.conditional=false",
    "data.flip=true",
    "network.label_dim=0",
    "network.img_resolution=4",
    "network.model_channels=8",
    "network.channel_mult=1",
    f"teacher.steps={STEPS}",
    "teacher.batch=8",
    f"ctm.steps={STEPS}",
    "ctm.batch=8",
    "ctm.points=4",
    "ctm.max_solver_steps=2",
    "gan.steps=6",
    "gan.batch=8",
    "gan.points=4",
    "gan.max_solver_steps=2",
    "gan.features_size=32",
    "gan.discriminator_width=8",
    f"snapshot_every={STEPS // 2}",
)
CPU = torch.device("cpu")
SEED, BATCH = 11, 8


def write_data(directory: Path) -> Path:
    """Eleven images, so that batches straddle epochs."""
    path = directory / "tiny.npz"
    if not path.exists():
        np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (11, 4, 4, 1), dtype=np.uint8))
    return path


def config_of(directory: Path, *changes: str) -> RunConfig:
    return override(preset("digits"), [f"data.source={directory / 'tiny.npz'}", *SETTINGS, *changes])


def snapshots(run: Path) -> dict[str, Tensor]:
    """Every weight of every last snapshot."""
    found: dict[str, Tensor] = {}
    for stage, last in (("teacher", STEPS), ("ctm", STEPS), ("gan", 6)):
        path = run / f"snapshot-{stage}-{last:06d}.safetensors"
        if path.exists():
            found |= {f"{stage}.{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Of each tensor's own scale."""
    assert found.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max() + 1e-7, name


def error_of(config: RunConfig, outdir: Path, execution: Execution) -> str:
    try:
        train(config, outdir, execution)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def split_gradients(ranks: Ranks) -> dict[str, Tensor]:
    """Of all three losses, this rank's share of the batch in four pieces."""
    _, fast = steps(BASE, adversarial=True)
    fast.average = lambda found: list(all_mean(torch.stack(found)).unbind())
    share = ranks.share(BATCH)
    size = (share.stop - share.start) // 4
    parts = [
        draw(BASE, SEED, slice(start, start + size), batch=BATCH) for start in range(share.start, share.stop, size)
    ]
    targets = [(part, fast.consistency_target(fast.solve(part.x_t, part.way, part.labels), part)) for part in parts]
    fast.backward(targets, adversarial=True)
    average_gradients(fast.student.parameters())
    return gradients(fast.student)


def on_two(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """All that two ranks are asked in one start: what they refuse, then gradients, then a run in micro-batches."""
    execution = Execution(CPU, ranks)
    config = config_of(directory)
    other = directory / f"other-{ranks.rank}.npz"
    np.savez(other, arr_0=np.full((11, 4, 4, 1), ranks.rank, np.uint8))
    source = directory / "same-name.npz"
    if ranks.is_first:
        shutil.copy(other, source)
    refused = directory / "refused"
    told = {
        "config": error_of(override(config, [f"ctm.lr={1e-3 * (1 + ranks.rank)}"]), refused, execution),
        "data": error_of(override(config, [f"data.source={other}"]), refused, execution),
        "options": error_of(config, refused, replace(execution, micro_batch=1 + ranks.rank)),
        "batch": error_of(override(config, ["ctm.batch=5"]), refused, execution),
        "one": error_of(
            override(config, ["data.source=nowhere.npz"]) if ranks.rank == 1 else config, refused, execution
        ),
    }

    def disk_full() -> None:
        if ranks.is_first:
            raise OSError(28, "No space left on device")

    try:
        together(disk_full)
    except (ConfigError, OSError) as error:
        told["write"] = f"{type(error).__name__}: {error}"
    assert not refused.exists()
    result = {"told": told, "gradients": split_gradients(ranks)}
    train(config, directory / "two", replace(execution, micro_batch=2))
    return result


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("two")
    write_data(directory)
    return directory, in_ranks(on_two, 2, directory)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, two: tuple[Path, list[dict[str, Any]]]) -> dict[str, Tensor]:
    """What one rank makes of the same data."""
    torch.set_num_threads(1)
    return snapshots(train(config_of(two[0]), tmp_path_factory.mktemp("one"), Execution(CPU)))


def test_two_ranks_train_as_one(two: tuple[Path, list[dict[str, Any]]], one: dict[str, Tensor]) -> None:
    """Teacher and student after twenty steps each."""
    assert_close(snapshots(two[0] / "two" / "00000-digits"), one)
    lines = [json.loads(line) for line in (two[0] / "two" / "00000-digits" / "stats.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("teacher", "ctm") for step in (STEPS // 2, STEPS)
    ]


def test_gradients_do_not_know_of_the_split(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Two ranks with four micro-batches each, against the whole batch written the published way."""
    naive, _ = steps(BASE, adversarial=True)
    whole = draw(BASE, SEED, slice(0, BATCH), batch=BATCH)
    naive.backward(whole, naive.consistency_target(naive.solve(whole), whole), adversarial=True)
    expected = gradients(naive.student)
    for rank in two[1]:
        assert_close(rank["gradients"], expected, 3e-5)


def test_ranks_that_are_not_one_job(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Each of them says so, and why; nothing was written (asserted there)."""
    told = [rank["told"] for rank in two[1]]
    for each in told:
        assert each["config"].endswith(
            "configuration: expected the same on every rank, got ctm.lr = 0.002 on rank 1, 0.001 on rank 0"
        )
        assert "configuration: expected the same on every rank, got data" in each["data"]
        assert each["options"].endswith("got --micro-batch = 2 on rank 1, 1 on rank 0")
        assert each["batch"] == "ConfigError: ctm.batch: expected a multiple of the 2 ranks, got 5"
        assert "nowhere.npz" in each["one"]
    assert told[0]["one"].startswith("ConfigError: rank 1: data: ")
    assert told[1]["one"].startswith("DataError: data: ")
    assert told[0]["write"] == "OSError: [Errno 28] No space left on device"
    assert told[1]["write"] == "ConfigError: rank 0: [Errno 28] No space left on device"


def half_way(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was half through its second stage."""
    shutil.copytree(run, copy / run.name)
    for name in ("report.md", f"snapshot-ctm-{STEPS:06d}.safetensors"):
        (copy / run.name / name).unlink()
    for state in (copy / run.name).glob(f"state-ctm-{STEPS:06d}*"):
        shutil.rmtree(state) if state.is_dir() else state.unlink()
    return copy


def test_one_rank_goes_on_where_two_stopped(
    two: tuple[Path, list[dict[str, Any]]],
    one: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outdir = half_way(two[0] / "two" / "00000-digits", tmp_path)
    with pytest.raises(ConfigError, match=r"--parallel: expected ddp, as when .*state-ctm-000010\.pt was saved"):
        train(config_of(two[0]), outdir, Execution(CPU, fsdp=True))
    run = train(config_of(two[0]), outdir, Execution(CPU))
    assert f"going on after step {STEPS // 2} of ctm on cpu\n" in capsys.readouterr().out
    assert_close(snapshots(run), one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "--micro-batch: expected a positive number, got 0"),
        ({"fsdp": True, "compile": True}, "--parallel: expected ddp with --compile, got fsdp"),
    ],
)
def test_execution(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Execution(CPU, **options)


def test_second_passes_are_not_sharded(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = config_of(tmp_path, "ctm.estimate_outer=student")
    with pytest.raises(ConfigError, match=r"ctm\.estimate_outer: expected target with --parallel fsdp, got student"):
        train(config, tmp_path / "runs", Execution(CPU, fsdp=True))
    assert not (tmp_path / "runs").exists()


def sharded(ranks: Ranks, directory: Path) -> None:
    """A whole run with FSDP, activations made again; on more than two ranks, the rest of it."""
    execution = Execution(CPU, ranks, micro_batch=2, fsdp=True, checkpoint_blocks=True)
    train(config_of(directory), directory / f"fsdp-{ranks.size}", execution)


@pytest.fixture(scope="module")
def shards(two: tuple[Path, list[dict[str, Any]]]) -> Path:
    in_ranks(sharded, 2, two[0])
    return two[0] / "fsdp-2" / "00000-digits"


@pytest.mark.long
def test_sharded_ranks_train_as_one(shards: Path, one: dict[str, Tensor]) -> None:
    assert_close(snapshots(shards), one)
    states = sorted(path.name for path in shards.glob("state-*"))
    assert states == [f"state-ctm-{step:06d}" for step in (STEPS // 2, STEPS)]
    assert not list(shards.rglob(".*.tmp"))
    files = list((shards / states[-1]).glob("*.safetensors"))
    assert len(files) == 2
    assert max(file.stat().st_size for file in files) < 0.75 * sum(file.stat().st_size for file in files)


@pytest.mark.long
@pytest.mark.parametrize("fsdp", [True, False])
def test_one_rank_goes_on_from_shards(shards: Path, one: dict[str, Tensor], tmp_path: Path, fsdp: bool) -> None:
    outdir = half_way(shards, tmp_path)
    assert_close(snapshots(train(config_of(shards.parent.parent), outdir, Execution(CPU, fsdp=fsdp))), one)


@pytest.mark.long
def test_four_ranks_go_on_from_shards(shards: Path, one: dict[str, Tensor]) -> None:
    directory = shards.parent.parent
    half_way(shards, directory / "fsdp-4")
    in_ranks(sharded, 4, directory)
    assert_close(snapshots(directory / "fsdp-4" / shards.name), one)


@pytest.mark.long
def test_damaged_shards(
    shards: Path, one: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state before is gone back to, in so many words, and the damaged one is replaced."""
    shutil.copytree(shards, tmp_path / shards.name)
    (tmp_path / shards.name / "report.md").unlink()
    damaged = tmp_path / shards.name / f"state-ctm-{STEPS:06d}"
    file = next(damaged.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    run = train(config_of(shards.parent.parent), tmp_path, Execution(CPU, fsdp=True))
    told = capsys.readouterr().out
    assert f"{damaged}: the checksum of {file.name} is wrong; going back to the one before" in told
    assert f"going on after step {STEPS // 2} of ctm" in told
    assert_close(snapshots(run), one)


def adversarial(ranks: Ranks, directory: Path) -> None:
    """All three stages; the discriminator's norms know of all ranks."""
    for name, fsdp in (("gan", False), ("gan-fsdp", True)):
        config = config_of(directory, "stages=teacher,ctm,gan")
        train(config, directory / f"{name}-{ranks.size}", Execution(CPU, ranks, fsdp=fsdp), features=[Maps()])


@pytest.mark.long
def test_adversarial_ranks_train_as_one(tmp_path: Path) -> None:
    write_data(tmp_path)
    adversarial(Ranks(), tmp_path)
    in_ranks(adversarial, 2, tmp_path)
    expected = snapshots(tmp_path / "gan-1" / "00000-digits")
    assert any(name.startswith("gan.") for name in expected)
    for name in ("gan-2", "gan-fsdp-1", "gan-fsdp-2"):
        assert_close(snapshots(tmp_path / name / "00000-digits"), expected)


def torchrun(outdir: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "-m", "ctm_fast.train", "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(
        [*command, "--outdir", str(outdir), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def words_of(config: tuple[str, ...], data: Path) -> list[str]:
    return ["--data", str(data), *(word for assignment in config for word in ("--set", assignment))]


def kill_rank(process: subprocess.Popen[str], rank: int) -> None:
    """SIGKILL to a child of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again(rank: int, tmp_path: Path) -> None:
    """Torchrun starts all ranks anew; they go on from the last state and end bit for bit as if nothing had been."""
    words = words_of((*SETTINGS, "ctm.steps=60", "snapshot_every=20"), write_data(tmp_path))
    alone = torchrun(tmp_path / "alone", *words)
    out, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, out
    process = torchrun(tmp_path / "killed", *words, restarts=3)
    run = tmp_path / "killed" / "00000-digits"
    while not (run / "state-ctm-000020.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    kill_rank(process, rank)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "going on after step" in out
    for name in ("snapshot-teacher-000020.safetensors", "snapshot-ctm-000060.safetensors"):
        killed, expected = (load_file(tmp_path / which / "00000-digits" / name) for which in ("killed", "alone"))
        assert killed.keys() == expected.keys()
        assert all(torch.equal(killed[key], expected[key]) for key in expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("ctm.batch=5", "error: ctm.batch: expected a multiple of the 2 ranks, got 5"),
        ("teacher.lr=1e30", "error: teacher: expected finite"),
    ],
)
def test_an_error_is_one_line(assignment: str, line: str, tmp_path: Path) -> None:
    """Of all ranks together, before anything is written as in the middle of training."""
    process = torchrun(tmp_path / "runs", *words_of((*SETTINGS, "max_skipped=2", assignment), write_data(tmp_path)))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("error: ") == out.count(line) == 1, out
    assert "exitcode  : 2" in out
    assert "ctm_fast/" not in out.replace(str(tmp_path), ""), out


def test_alone_an_error_is_its_own() -> None:
    def fail() -> None:
        raise DataError("data: expected some")

    with pytest.raises(DataError, match=r"^data: expected some$"):
        together(fail)
    assert together(lambda: 3) == 3
