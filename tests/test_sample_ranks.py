"""``python -m ctm_fast.sample`` over ranks: the same bytes from any number of them, killed and started again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast import sample
from ctm_fast.data import load_dataset
from ctm_fast.distributed import Ranks
from ctm_fast.models import CTM
from ctm_fast.serving import outputs
from tests.command_line import Tree, assert_refused, call, tree
from tests.snapshots import save_snapshot

ROOT = Path(__file__).parent.parent
WORDS = "--seeds 3-12,40 --steps 2 --gamma 0.5 --labels random --batch 2 --device cpu --threads 1"  # six shards
OUTS = ["images", "images.npz"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_snapshot(tmp_path_factory.mktemp("network") / "ctm.safetensors", CTM)


def rank(
    number: int,
    size: int,
    network: Path,
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str = WORDS,
) -> tuple[int, str, str]:
    """Rank ``number`` of ``size``, in this process; of a .npz the first must come last, for it waits for the others."""
    monkeypatch.setattr(sample, "start_ranks", lambda _: (Ranks(number, size), torch.device("cpu")))
    return call(sample.main, ["--network", str(network), "--out", out, *words.split()], monkeypatch, capsys)


def folder(path: Path, name: str) -> Path:
    """An empty current directory."""
    (path / name).mkdir()
    os.chdir(path / name)
    return path / name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", OUTS)
def test_any_number_of_ranks(
    out: str, network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees = []
    for size in (1, 2, 3):
        place = folder(here, f"of-{size}")
        for number in reversed(range(size)):
            code, said, err = rank(number, size, network, out, monkeypatch, capsys)
            assert (code, err) == (0, "")
            assert said == (f"{out}\n" if number == 0 else "")
            assert number == 0 or not Path("images.npz").exists()
        trees.append(tree(place))
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == (14 if out == "images" else 2)  # 11 images, the folder, its classes and its manifest


def test_every_image_is_made_once(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Counter[int] = Counter()
    call_of_a_sampler = sample.Sampler.__call__

    def counted(self: sample.Sampler, seeds: list[int], *args: object, **options: object) -> object:
        made.update(seeds)
        return call_of_a_sampler(self, seeds, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sample.Sampler, "__call__", counted)
    assert rank(1, 3, network, "images", monkeypatch, capsys)[0] == 0
    assert made == Counter([5, 6, 11, 12])  # its shards alone: the second and the fifth of six
    for _ in range(2):  # the second time there is nothing left to do
        for number in range(3):
            assert rank(number, 3, network, "images", monkeypatch, capsys)[0] == 0
    assert made == Counter([*range(3, 13), 40])


def test_arrays_hold_what_the_folder_holds(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in OUTS:
        assert rank(0, 1, network, out, monkeypatch, capsys)[0] == 0
    with np.load("images.npz") as arrays:
        assert arrays["seeds"].tolist() == [*range(3, 13), 40]
        assert len(set(arrays["arr_1"].tolist())) > 3
        assert arrays["arr_0"].std() > 10
        for seed, label, pixels in zip(arrays["seeds"], arrays["arr_1"], arrays["arr_0"], strict=True):
            with Image.open(f"images/seed{seed:06d}.png") as image:
                assert np.array_equal(np.asarray(image), pixels[..., 0])
            alone = sample.load(network, device="cpu")([seed], steps=2, gamma=0.5, labels=[label], output="uint8")
            assert isinstance(alone, torch.Tensor)
            assert np.abs(alone.numpy().astype(int) - pixels).max() <= 1  # another batch rounds differently
    manifest = json.loads(Path("images.json").read_text())
    assert manifest == json.loads(Path("images.npz.json").read_text())
    read = [load_dataset(out, resolution=8, labels=True) for out in OUTS]  # both are data sets of the same images
    assert torch.equal(read[0].images, read[1].images)
    assert read[0].labels is not None
    assert read[1].labels is not None
    assert torch.equal(read[0].labels, read[1].labels)
    assert manifest["seeds"] == "3-12,40"
    assert manifest["labels"] == "random"


def test_large_folders_are_divided(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outputs, "FLAT", 10)
    words = "--seeds 999-1001,1999-2002,12345678-12345681 --batch 4 --device cpu"
    assert rank(0, 1, network, "images", monkeypatch, capsys, words)[0] == 0
    names = sorted(str(path) for path in Path("images").rglob("*.png"))
    seeds = [*range(999, 1002), *range(1999, 2003), *range(12345678, 12345682)]
    assert names == sorted(f"images/{seed // 1000 * 1000:06d}/seed{seed:06d}.png" for seed in seeds)


def test_the_current_folder(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder(here, "images")
    assert rank(0, 1, network, ".", monkeypatch, capsys)[0] == 0
    assert (place / "seed000040.png").exists()
    assert (here / "images.json").exists()
    assert_refused(rank(0, 1, network, "/", monkeypatch, capsys), "--out: expected a folder below the root, got /")


def test_batch_size_is_felt_in_rounding_alone(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = []
    for batch in (1, 7, 64):
        words = f"--seeds 0-63 --steps 2 --gamma 1 --batch {batch} --device cpu"
        assert rank(0, 1, network, f"{batch}.npz", monkeypatch, capsys, words)[0] == 0
        with np.load(f"{batch}.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    for other in images[1:]:
        assert np.abs(other - images[0]).max() <= 1
        assert (other != images[0]).mean() < 1e-3


OTHER = [
    ("--seeds 3-12,41", "seeds", '"3-12,41" here'),
    ("--seeds 40,3-12", "seeds", '"40,3-12" here'),
    ("--steps 3", "steps", "2 in", "3 here"),
    ("--gamma 0.6", "gamma", "0.6 here"),
    ("--labels 0-9", "labels", '"random" in', '"0-9" here'),
    ("--batch 3", "batch", "3 here"),
    ("--dtype bfloat16", "dtype", '"bfloat16" here'),
]


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("state", ["begun", "whole"])
def test_another_run_is_refused(
    out: str,
    state: str,
    network: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rank(1, 2, network, out, monkeypatch, capsys)[0] == 0
    if state == "whole":
        assert rank(0, 2, network, out, monkeypatch, capsys)[0] == 0
    other = save_snapshot(here / "other.safetensors", CTM, classes=11)
    before = tree(here)
    for words, *parts in OTHER:
        refused = rank(0, 1, network, out, monkeypatch, capsys, f"{WORDS} {words}")
        assert_refused(refused, "--out: expected the place of a run like this one", *parts)
    refused = rank(0, 1, other, out, monkeypatch, capsys)
    assert_refused(refused, "--out: expected the place of a run like this one", "network_sha256")
    assert tree(here) == before


def test_what_is_not_ours_is_left_alone(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("images").mkdir()
    Path("images/seed000003.png").write_text("mine")
    Path("images.npz").write_text("mine")
    Path("broken.json").write_text("[1, 2")
    before = tree(here)
    assert_refused(rank(0, 1, network, "images", monkeypatch, capsys), "--out: expected an empty folder or one of this")
    assert_refused(rank(0, 1, network, "images.npz", monkeypatch, capsys), "--out: expected a file that is not there")
    assert_refused(rank(0, 1, network, "broken", monkeypatch, capsys), "--out: expected what a run of images wrote")
    assert_refused(rank(0, 2, network, "grid.png", monkeypatch, capsys), "--out: expected a folder or a .npz for 2")
    assert tree(here) == before


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--steps 0", "steps: "),
        ("--gamma 2", "gamma: "),
        ("--labels 0-10", "labels: "),
        ("--seeds 1,2,1", "--seeds: expected each seed once"),
        ("--batch 0", "--batch: "),
        ("--guidance 2", "guidance: expected None for a model that was not trained with label dropout"),
        ("--dtype float8", "argument --dtype: "),
    ],
)
@pytest.mark.parametrize("out", OUTS)
def test_bad_input_writes_nothing(
    words: str,
    names: str,
    out: str,
    network: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = rank(0, 1, network, out, monkeypatch, capsys, f"{WORDS} {words}")
    assert_refused(refused, names)
    assert tree(here) == {}


def test_a_damaged_shard_is_named(
    network: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank(1, 2, network, "images.npz", monkeypatch, capsys)[0] == 0
    part = Path("images.npz.parts/part000003.npz")
    content = part.read_bytes()
    middle = len(content) // 3
    part.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    assert_refused(rank(0, 2, network, "images.npz", monkeypatch, capsys), str(part), "remove it and run again")
    assert not Path("images.npz").exists()
    part.unlink()
    assert rank(1, 2, network, "images.npz", monkeypatch, capsys)[0] == 0
    assert rank(0, 2, network, "images.npz", monkeypatch, capsys)[0] == 0


class Server:
    """The command line in forks of one process; see tests/training/fork_server.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.fork_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, network: Path, out: Path, **death: int) -> tuple[int, int, str]:
        """Exit status, how many file operations there were around ``out``, output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        log = out.parent.with_suffix(".log")
        words = f"{WORDS} --seeds 3-6,40"  # three shards
        argv = ["--network", str(network), "--out", str(out), *words.split()]
        request = {"program": "sample", "argv": argv, "outdir": str(out.parent), "log": str(log), **death}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], len(answer["operations"]), log.read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=30) == 0


def _killed_and_resumed(server: Server, network: Path, tmp_path: Path, out: str, every: int) -> None:
    (tmp_path / "whole").mkdir()
    status, operations, log = server(network, tmp_path / "whole" / out)
    assert status == 0, log
    expected = tree(tmp_path / "whole")
    for death in ("kill", "tear"):
        for number in range(0, operations, every):
            place = tmp_path / f"{death}-{number}"
            place.mkdir()
            status, _, log = server(network, place / out, **{death: number})
            assert status in (-signal.SIGKILL, -signal.SIGXFSZ, 0), log
            assert status < 0 or death == "tear"  # what opens no file for writing is not torn
            status, _, log = server(network, place / out)
            assert status == 0, log
            assert _visible(tree(place)) == expected, (death, number)


def _visible(files: Tree) -> Tree:
    """Without what a process left that was killed while it wrote the manifest, the one thing that stays."""
    return {name: content for name, content in files.items() if not re.fullmatch(r"\.images\.json\.\d+\.tmp", name)}


@pytest.mark.parametrize("out", OUTS)
def test_killed_and_resumed(out: str, server: Server, network: Path, tmp_path: Path) -> None:
    _killed_and_resumed(server, network, tmp_path, out, every=13)


@pytest.mark.long
@pytest.mark.parametrize("out", OUTS)
def test_killed_at_every_file_operation_and_resumed(out: str, server: Server, network: Path, tmp_path: Path) -> None:
    _killed_and_resumed(server, network, tmp_path, out, every=1)


def _torchrun(ranks: int, network: Path, out: Path, words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "ctm_fast.sample", "--network", str(network), "--out", str(out), *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def test_two_ranks_of_torchrun(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert rank(0, 1, network, str(tmp_path / "one" / "images.npz"), monkeypatch, capsys)[0] == 0
    process = _torchrun(2, network, tmp_path / "two" / "images.npz", WORDS)
    said, err = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, f"{tmp_path / 'two' / 'images.npz'}\n"), err
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.long
def test_torchrun(network: Path, tmp_path: Path) -> None:
    trees = []
    for ranks in (1, 2, 3):
        for out in OUTS:
            place = tmp_path / str(ranks) / out
            place.parent.mkdir(exist_ok=True)
            process = _torchrun(ranks, network, place, WORDS)
            said, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert said == f"{place}\n"
        trees.append(tree(tmp_path / str(ranks)))
    assert trees[0] == trees[1] == trees[2]


def _kill(process: subprocess.Popen[str], victim: str) -> None:
    """SIGKILL to torchrun, its workers, or both; workers outlive a torchrun that is killed."""
    workers = [int(text) for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    victims = {"a rank": workers[-1:], "torchrun": [process.pid], "the job": [process.pid, *workers]}
    for number in victims[victim]:
        os.kill(number, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["a rank", "torchrun", "the job"])
@pytest.mark.parametrize("out", OUTS)
def test_torchrun_killed_and_resumed(out: str, victim: str, network: Path, tmp_path: Path) -> None:
    """Killed twice, once some images are there; then, by another number of ranks, as if it had not been."""
    words = "--seeds 0-1199 --steps 8 --gamma 0.5 --labels random --batch 4 --device cpu --threads 1"
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    place = tmp_path / "killed" / out
    pattern, count = ("images/*/*.png", 1200) if out == "images" else ("images.npz.parts/part*.npz", 300)
    for ranks, share in ((2, 0.1), (3, 0.3)):
        process = _torchrun(ranks, network, place, words)
        while len(list(place.parent.glob(pattern))) < share * count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        _kill(process, victim)
        process.wait(timeout=120)
        assert process.returncode != 0
        assert share * count <= len(list(place.parent.glob(pattern))) < count
    for name, ranks in (("killed", 2), ("whole", 1)):
        process = _torchrun(ranks, network, tmp_path / name / out, words)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert _visible(tree(tmp_path / "killed")) == tree(tmp_path / "whole")
