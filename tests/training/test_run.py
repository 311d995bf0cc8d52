"""A run that is killed anywhere and started again is the run that was not."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ctm_fast.errors import CheckpointError, ConfigError, DataError, DivergedError
from ctm_fast.models import EDMDenoiser, load_model
from ctm_fast.training import RunConfig, override, preset, train
from ctm_fast.training.compile_report import break_even
from ctm_fast.training.config import to_dict
from ctm_fast.training.execution import Execution
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.teacher_stage import TeacherStage

TINY = (
    "data.conditional=false",
    "data.flip=true",
    "network.label_dim=0",
    "network.img_resolution=4",
    "network.model_channels=4",
    "network.channel_mult=1",
    "network.dropout=0.2",
    "teacher.steps=5",
    "teacher.batch=4",
    "ctm.steps=5",
    "ctm.batch=4",
    "ctm.points=4",
    "ctm.max_solver_steps=2",
    "snapshot_every=2",
    "log_every=3",
)
CPU = Execution(torch.device("cpu"))
COSTS = (
    "seconds",
    "images_per_second",
    "seconds_per_kimg",
    "teacher_seconds",
    "teacher_share",
    "data_seconds",
    "peak_memory_mib",
    "tflops",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images, so that batches of four straddle epochs."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (11, 4, 4, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def config(data: Path) -> RunConfig:
    return override(preset("digits"), [f"data.source={data}", *TINY])


class Server:
    """Command lines in forks of one process; see fork_server.py."""

    def __init__(self, data: Path) -> None:
        self.argv = ["--device", "cpu", "--threads", "1", "--data", str(data)]
        self.argv += [word for assignment in TINY for word in ("--set", assignment)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, outdir: Path, **death: float | None) -> tuple[int, list[tuple[str, str]], str]:
        """Exit status, file operations in ``outdir``, output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        log = outdir.with_suffix(".log")
        log.unlink(missing_ok=True)
        argv = [*self.argv, "--outdir", str(outdir)]
        request = {"argv": argv, "outdir": str(outdir), "log": str(log), **death}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], [tuple(item) for item in answer["operations"]], log.read_text()


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[Server]:
    server = Server(data)
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """The directory of a run that nothing happened to, and its file operations."""
    outdir = tmp_path_factory.mktemp("uninterrupted") / "runs"
    status, operations, log = server(outdir)
    assert status == 0, log
    return outdir / "00000-digits", operations


def result(run: Path) -> dict[str, Any]:
    """Everything that a run leaves but for what it cost, to be compared with ``same``."""
    contents: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                contents[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                contents[f"{name} metadata"] = file.metadata()
        elif path.suffix == ".pt":
            contents[name] = torch.load(path, weights_only=True)
        elif name == "stats.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            contents[name] = [{key: line[key] for key in line if key not in COSTS} for line in lines]
        elif name == "report.json":
            contents[name] = json.loads(path.read_text())["rows"]
        elif name == "report.md":
            contents[name] = "there"  # it tells times
        elif path.is_file():
            contents[name] = path.read_bytes()
    return contents


def same(a: Any, b: Any) -> bool:
    """Equality bit for bit, through containers and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same(run: Path, expected: Path) -> None:
    got, wanted = result(run), result(expected)
    assert got.keys() == wanted.keys()
    differing = [name for name in wanted if not same(got[name], wanted[name])]
    assert not differing


def assert_whole(run: Path) -> None:
    """After a death, whatever goes by its final name can be read to its end (but stats.jsonl's last line)."""
    for path in run.rglob("*"):
        if path.name.endswith(".tmp"):
            continue
        if path.suffix == ".safetensors":
            load_model(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


POINTS = [
    ("kill", "open a", ".lock", 0),
    ("tear", "open w", "config.json", 0),
    ("kill", "os.rename", "config.json", 0),
    ("tear", "open a", "stats.jsonl", 1),
    ("tear", "open w", "snapshot-teacher-000004.safetensors", 0),
    ("kill", "open w", "teacher-000004.png", 0),
    ("kill", "open w", "state-teacher-000004.pt", 0),  # the snapshot is there, its state is not
    ("tear", "open w", "state-teacher-000004.pt", 0),
    ("kill", "os.rename", "state-teacher-000004.pt", 0),
    ("kill", "os.remove", "state-teacher-000002.pt", 0),
    ("kill", "open w", "state-ctm-000002.pt", 0),  # the teacher is whole, the student has no state yet
    ("tear", "open w", "state-ctm-000004.pt", 0),
    ("tear", "open w", "report.json", 0),
    ("kill", "os.rename", "report.md", 0),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(map(str, point)).replace(" ", "_"))
def test_killed_and_started_again(
    server: Server,
    uninterrupted: tuple[Path, list[tuple[str, str]]],
    tmp_path: Path,
    point: tuple[str, str, str, int],
) -> None:
    expected, operations = uninterrupted
    way, event, name, occurrence = point
    index = [i for i, operation in enumerate(operations) if operation == (event, name)][occurrence]
    _die_and_go_on(server, tmp_path / "runs", expected, **{way: index})


@pytest.mark.long
@pytest.mark.parametrize("way", ["kill", "tear"])
@pytest.mark.parametrize("part", range(8))
def test_killed_at_every_file_operation(
    server: Server, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path, way: str, part: int
) -> None:
    expected, operations = uninterrupted
    for index, (event, _) in list(enumerate(operations))[part::8]:
        if way == "kill" or event in ("open w", "open a"):
            _die_and_go_on(server, tmp_path / f"{index}", expected, **{way: index})
            shutil.rmtree(tmp_path / f"{index}")


@pytest.mark.long
@pytest.mark.parametrize("trial", range(16))
def test_killed_at_random_moments(
    server: Server, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path, trial: int
) -> None:
    """Again and again, until a process gets to the end; later ones live longer."""
    rng = random.Random(trial)
    deaths = 0
    while server(tmp_path / "runs", after=rng.uniform(0.0, 0.3 * (1 + deaths)))[0] != 0:
        deaths += 1
        assert_whole(tmp_path / "runs")
    assert_same(tmp_path / "runs" / "00000-digits", uninterrupted[0])


def _die_and_go_on(server: Server, outdir: Path, expected: Path, **death: int) -> None:
    status, _, log = server(outdir, **death)
    assert status < 0, log  # ended by the signal, not by an exit
    assert_whole(outdir)
    status, _, log = server(outdir)
    assert status == 0, log
    assert [path.name for path in outdir.iterdir()] == ["00000-digits"]
    assert_same(outdir / "00000-digits", expected)


def test_goes_on_from_the_last_state(
    server: Server, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    """It says from where, and does not make the steps before it again."""
    _, operations = uninterrupted
    server(tmp_path / "runs", kill=operations.index(("open w", "state-ctm-000004.pt")))
    _, operations, log = server(tmp_path / "runs")
    assert "going on after step 2 of ctm" in log
    made = [name for event, name in operations if event == "open w" and name.startswith("snapshot-")]
    assert made == ["snapshot-ctm-000004.safetensors", "snapshot-ctm-000005.safetensors"]


def test_log_of_the_uninterrupted_run(uninterrupted: tuple[Path, list[tuple[str, str]]]) -> None:
    lines = result(uninterrupted[0])["stats.jsonl"]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("teacher", "ctm") for step in (2, 3, 4, 5)
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_finished_run_is_left_as_it_is(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = override(config, ["teacher.steps=1", "ctm.steps=1"])
    run = train(config, tmp_path, CPU)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(config, tmp_path, CPU) == run
    assert "already finished" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


def test_one_directory_per_configuration(config: RunConfig, tmp_path: Path) -> None:
    first = RunDirectory.open(tmp_path, config).path
    other = RunDirectory.open(tmp_path, override(config, ["seed=1"])).path
    assert (first.name, other.name) == ("00000-digits", "00001-digits")
    assert RunDirectory.open(tmp_path, config).path == first


def test_two_processes_on_one_run(
    server: Server, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    copy = shutil.copytree(uninterrupted[0], tmp_path / "runs" / "00000-digits")
    before = result(copy)
    with (copy / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, log = server(tmp_path / "runs")
    assert status == 2
    assert log.count("\n") == 1
    assert "--outdir" in log
    assert "another process" in log
    assert same(result(copy), before)


def test_leftovers_of_a_killed_process_go(config: RunConfig, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, config)
    leftovers = [run.path / ".state-ctm-000002.pt.123.tmp", run.path / "samples" / ".a.png.9.tmp"]
    for path in leftovers:
        path.write_bytes(b"half a fi")
    del run  # and with it the lock
    RunDirectory.open(tmp_path, config)
    assert not any(path.exists() for path in leftovers)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[: middle - 40] + bytes(byte ^ 255 for byte in content[middle - 40 : middle]) + content[middle:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": _cut,
    "empty": lambda content: b"",
    "text": lambda content: b"not a state\n",
    "pickle": lambda content: b"cos\nsystem\n(S'true'\ntR.",
    "overwritten": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state(
    config: RunConfig,
    uninterrupted: tuple[Path, list[tuple[str, str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    """The one before it is gone back to, in so many words, and the run ends as it would have."""
    copy = shutil.copytree(uninterrupted[0], tmp_path / "00000-digits")
    (copy / "report.md").unlink()
    state = copy / "state-ctm-000005.pt"
    state.write_bytes(DAMAGES[damage](state.read_bytes()))
    train(config, tmp_path, CPU)
    told = capsys.readouterr().out.splitlines()
    assert "state-ctm-000005.pt: not a whole training state" in told[0]
    assert told[0].endswith("going back to the one before")
    assert "going on after step 4 of ctm" in told[1]
    assert_same(copy, uninterrupted[0])


def test_no_whole_state(config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path) -> None:
    copy = shutil.copytree(uninterrupted[0], tmp_path / "00000-digits")
    (copy / "report.md").unlink()
    states = sorted(copy.glob("state-*.pt"))
    assert [state.name for state in states] == ["state-ctm-000004.pt", "state-ctm-000005.pt"]
    for state in states:
        state.write_bytes(_cut(state.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state-ctm-000005\.pt: not a whole training state") as error:
        train(config, tmp_path, CPU)
    assert "\n" not in str(error.value)
    assert not (copy / "report.md").exists()


def test_state_of_another_run(
    config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    other = override(config, ["seed=5"])
    run = train(other, tmp_path, CPU)
    (run / "report.md").unlink()
    for state in run.glob("state-*.pt"):
        shutil.copy(uninterrupted[0] / state.name, run)
    with pytest.raises(CheckpointError, match="another's"):
        train(other, tmp_path, CPU)


def test_stage_after_stage_is_the_full_run(
    config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    alone = train(override(config, ["stages=teacher"]), tmp_path, CPU)
    teacher = alone / "snapshot-teacher-000005.safetensors"
    student = train(override(config, ["stages=ctm"]), tmp_path, CPU, teacher=teacher)
    assert (alone.name, student.name) == ("00000-digits", "00001-digits")
    expected = result(uninterrupted[0])
    assert same(result(alone)[teacher.name], expected[teacher.name])
    name = "snapshot-ctm-000005.safetensors"
    assert same(result(student)[name], expected[name])
    assert (student / "report.md").exists()
    assert "student" in (student / "report.md").read_text()
    assert "student" not in (alone / "report.md").read_text()
    assert train(override(config, ["stages=ctm"]), tmp_path, CPU, teacher=teacher) == student  # is found again


def test_seeds(config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]], tmp_path: Path) -> None:
    again = train(config, tmp_path / "again", CPU)
    assert_same(again, uninterrupted[0])
    other = train(override(config, ["seed=1"]), tmp_path / "other", CPU)
    for name in ("snapshot-teacher-000005.safetensors", "snapshot-ctm-000005.safetensors"):
        assert not same(result(other)[name], result(again)[name])


def test_every_file_says_what_it_is_of(config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]]) -> None:
    run = uninterrupted[0]
    tree = json.loads((run / "config.json").read_text())["config"]
    assert len(tree["data_sha256"]) == 64
    assert tree == {**to_dict(config), "data_sha256": tree["data_sha256"], "precision": "fp32"}
    snapshots = list(run.glob("snapshot-*.safetensors"))
    assert len(snapshots) == 6
    for path in snapshots:
        metadata = load_model(path)[1]
        assert metadata["config"] == tree
        assert (metadata["seed"], metadata["preset"]) == (config.seed, "digits")
        assert path.name == f"snapshot-{metadata['stage']}-{metadata['step']:06d}.safetensors"
    state = torch.load(run / "state-ctm-000005.pt", weights_only=True)
    assert state["config"] == tree
    assert (state["stage"], state["step"]) == ("ctm", 5)


def test_the_snapshot_is_the_average(config: RunConfig, uninterrupted: tuple[Path, list[tuple[str, str]]]) -> None:
    run = uninterrupted[0]
    model, _ = load_model(run / "snapshot-ctm-000005.safetensors")
    weights = torch.load(run / "state-ctm-000005.pt", weights_only=True)["weights"]
    assert same(dict(model.state_dict()), dict(weights["ema"]))
    assert not same(dict(model.state_dict()), dict(weights["model"]))
    assert isinstance(load_model(run / "snapshot-teacher-000005.safetensors")[0], EDMDenoiser)


def test_divergence_is_told_and_not_saved(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"teacher: .*got loss and gradients .*from step 1 on.*lower teacher\.lr"):
        train(override(config, ["teacher.lr=1e30", "max_skipped=2", "snapshot_every=9"]), tmp_path, CPU)
    assert not list((tmp_path / "00000-digits").glob("state-*"))


def test_weights_that_diverge_in_the_last_update_are_not_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is of the weights before the update, so it does not tell."""
    update = TeacherStage.train_step

    def diverging(stage: TeacherStage, step: int) -> dict[str, torch.Tensor]:
        figures = update(stage, step)
        with torch.no_grad():
            stage.model.net.out_conv.bias.fill_(torch.nan)
        return figures

    monkeypatch.setattr(TeacherStage, "train_step", diverging)
    with pytest.raises(DivergedError, match="expected finite weights"):
        train(override(config, ["teacher.steps=1"]), tmp_path / "runs", CPU)
    assert not list(tmp_path.rglob("snapshot-*")) and not list(tmp_path.rglob("state-*"))


def test_a_class_without_images_has_no_variance(tmp_path: Path) -> None:
    sizes = ["network.label_dim=12", "network.model_channels=8", "teacher.steps=1", "teacher.batch=8"]
    run = train(override(preset("digits"), ["stages=teacher", *sizes]), tmp_path / "runs", CPU)
    rows = json.loads((run / "report.json").read_text())["rows"]
    assert all(row["variance_ratio"] is None and row["frechet"] > 0 for row in rows)


def test_other_data_at_the_same_path_is_another_run(config: RunConfig, tmp_path: Path) -> None:
    path, outdir = tmp_path / "data.npz", tmp_path / "runs"
    small = override(config, [f"data.source={path}", "stages=teacher"])
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    names = []
    for shift in (0, 1, 0):
        np.savez(path, arr_0=images + np.uint8(shift), arr_1=np.arange(20) % 10)
        names.append(train(small, outdir, CPU).name[:5])
    assert names == ["00000", "00001", "00000"]


@pytest.mark.parametrize(
    ("cost", "saved", "steps", "expected"),
    [(10.0, 0.1, 200, 100), (10.0, 0.1, 100, 100), (10.0, 0.1, 99, None), (0.0, 0.1, 10, 0), (1.0, -0.1, 10, None)],
)
def test_break_even(cost: float, saved: float, steps: int, expected: int | None) -> None:
    assert break_even(cost, saved, steps) == expected


def test_refused_before_anything_is_written(config: RunConfig, tmp_path: Path) -> None:
    outdir = tmp_path / "runs"
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(CheckpointError, match="--teacher"):
        train(override(config, ["stages=ctm"]), outdir, CPU, teacher=missing)
    with pytest.raises(ConfigError, match="--teacher"):
        train(override(config, ["stages=ctm"]), outdir, CPU)
    with pytest.raises(ConfigError, match="--teacher"):
        train(config, outdir, CPU, teacher=missing)
    with pytest.raises(DataError, match="images of 2x2"):
        train(override(config, ["network.img_resolution=2"]), outdir, CPU)
    assert not outdir.exists()
