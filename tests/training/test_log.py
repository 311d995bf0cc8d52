"""What a run writes beside its weights: figures, grids, evaluations, averages; and that looking changes nothing."""

import copy
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctm_fast import reconstruct
from ctm_fast.data import load_dataset
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.models import load_model
from ctm_fast.training import RunConfig, override, preset, reference, train
from ctm_fast.training.execution import Execution
from ctm_fast.training.loop import run_stage
from ctm_fast.training.reference import Reference
from ctm_fast.training.regions import Regions
from ctm_fast.training.run_directory import RunDirectory
from ctm_fast.training.teacher_stage import TeacherStage
from ctm_fast.training.work import operations
from tests.command_line import call

CPU = Execution(torch.device("cpu"))
SMALL = (
    "network.model_channels=4",
    "network.channel_mult=1",
    "network.dropout=0.2",
    "teacher.steps=4",
    "teacher.batch=8",
    "ctm.steps=12",
    "ctm.batch=8",
    "ctm.points=4",
    "ctm.max_solver_steps=2",
    "snapshot_every=4",
    "log_every=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=pixels, arr_1=np.arange(40) % 10)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_classifier() -> Iterator[None]:
    """Its steps are a tenth: nothing here is about how good it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "train_classifier", partial(train_classifier, steps=100))
        yield


@pytest.fixture(scope="module")
def config(data: Path) -> RunConfig:
    return override(preset("digits"), [f"data.source={data}", *SMALL])


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with all there is to be had."""
    more = ["ctm.emas=0.9,power:0.05,power:0.1", "preview_kimg=0.016", "evaluate_kimg=0.032"]
    return train(override(config, more), tmp_path_factory.mktemp("run"), CPU, keep=2, tensorboard=True)


def lines(run: Path, kind: str, stage: str = "ctm") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [line for line in found if line["stage"] == stage and kind in line]


def test_figures(run: Path, config: RunConfig) -> None:
    """What they say of one another, and of the machine."""
    work = operations(config.network, s_branch=True)
    for line in lines(run, "seconds"):
        assert line["seconds_per_kimg"] == pytest.approx(1000 / line["images_per_second"])
        assert line["images_per_second"] == pytest.approx(2 * config.ctm.batch / line["seconds"])
        assert line["teacher_share"] == pytest.approx(line["teacher_seconds"] / line["seconds"])
        assert 0 < line["teacher_share"] < 1 and 0 < line["data_seconds"] < line["seconds"]
        assert 50 < line["peak_memory_mib"] < 100_000
        passes = line["tflops"] * 1e12 * line["seconds"] / work / (2 * config.ctm.batch)
        # k in 1..2: the solver makes 2 k, estimate and DSM 3 each, three further jumps 1 each or, where they stay, 0
        assert 2 * line["k"] + 6 <= passes + 1e-6 <= 2 * line["k"] + 10.1
        assert line["lr"] == pytest.approx(config.ctm.lr * (1 - (line["step"] - 1) / config.ctm.steps))
        assert line["skipped"] == 0 and line["lambda_dsm"] > 0
    teacher = lines(run, "seconds", "teacher")[0]
    work = operations(config.network, s_branch=False)
    assert teacher["tflops"] * 1e12 * teacher["seconds"] == pytest.approx(3 * 2 * config.teacher.batch * work)
    assert "teacher_share" not in teacher


def test_grids(run: Path) -> None:
    """Every 16 images, that is every second step, in one step and in two; always the same seeds."""
    names = [path.name for path in sorted((run / "samples").glob("ctm-*"))]
    assert names == sorted(f"ctm-{step:06d}{end}.png" for step in range(2, 13, 2) for end in ("", "-2-steps"))
    assert Image.open(run / "samples" / names[0]).size == Image.open(run / "samples" / names[1]).size
    assert (run / "samples" / names[0]).read_bytes() != (run / "samples" / names[1]).read_bytes()
    assert len(list((run / "samples").glob("teacher-*"))) == 2


def test_evaluations(run: Path) -> None:
    """Every 32 images, by the samples that the snapshot of that step gives."""
    assert [line["step"] for line in lines(run, "evaluation")] == [4, 8, 12]
    last = lines(run, "evaluation")[-1]["evaluation"]
    assert last.keys() == {"nfe", "recognised", "variance_ratio", "frechet"} and last["nfe"] == 1
    config = RunDirectory(run, override(preset("digits"), SMALL)).config
    dataset = load_dataset(
        json.loads((run / "config.json").read_text())["config"]["data"]["source"], resolution=8, labels=True
    )
    model, _ = load_model(run / "snapshot-ctm-000012.safetensors")
    figures = Reference.of(config, dataset, CPU.device).figures(model, count=500, steps=1)
    assert vars(figures) == last
    assert lines(run, "evaluation", "teacher")[0]["evaluation"]["nfe"] == 35


def test_event_files_hold_the_same(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard" / "ctm"), size_guidance={"images": 0})
    events.Reload()
    for name in ("loss", "dsm_loss", "lambda_dsm", "tflops", "lr", "skipped", "images_per_second"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(run, "seconds")]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    expected = [(line["step"], pytest.approx(line["evaluation"]["frechet"])) for line in lines(run, "evaluation")]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/frechet")] == expected
    for name in ("samples/1 step", "samples/2 steps"):
        assert [image.step for image in events.Images(name)] == [2, 4, 6, 8, 10, 12]


def test_event_files_of_a_resumed_run(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were made again are there once."""
    advance = TeacherStage.train_step

    def dying(stage: TeacherStage, step: int) -> dict[str, torch.Tensor]:
        if step == 7:
            raise KeyboardInterrupt
        return advance(stage, step)

    longer = override(config, ["stages=teacher", "teacher.steps=8"])
    with monkeypatch.context() as patch:
        patch.setattr(TeacherStage, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(longer, tmp_path, CPU, tensorboard=True)
    run = train(longer, tmp_path, CPU, tensorboard=True)
    assert len(list((run / "tensorboard" / "teacher").iterdir())) == 2
    events = EventAccumulator(str(run / "tensorboard" / "teacher"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [line["step"] for line in lines(run, "seconds", "teacher")] == [2, 4, 6, 8]


def test_without_the_extra(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctm_fast.training.tensorboard", None)
    with pytest.raises(ConfigError, match=r"^--tensorboard: "):
        train(config, tmp_path / "runs", CPU, tensorboard=True)
    assert not (tmp_path / "runs").exists()


def test_further_averages_go_on_to_any_width(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0.9", "power_0.05", "power_0.1"):
        metadata = load_model(run / f"ema-{name}-ctm-000012.safetensors")[1]
        assert (metadata["stage"], metadata["step"], metadata["ema"]) == ("ctm", 12, name.replace("_", ":"))
    out = tmp_path / "out.safetensors"
    argv = [str(run), "--ema", "0.1", "--stage", "ctm", "--out", str(out)]
    assert call(reconstruct.main, argv, monkeypatch, capsys)[0] == 0
    got, expected = (load_model(path)[0] for path in (out, run / "ema-power_0.1-ctm-000012.safetensors"))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_average_is_that_of_its_name(run: Path) -> None:
    weights = torch.load(run / "state-ctm-000012.pt", weights_only=True)["weights"]
    for name, average in weights["averages"].items():
        saved = load_model(run / f"ema-{name.replace(':', '_')}-ctm-000012.safetensors")[0]
        assert all(torch.equal(tensor, average[key]) for key, tensor in saved.state_dict().items())


def test_keep(run: Path) -> None:
    """The last two of each stage, and of each average; of the teacher there is one, which the report needed."""
    kept = {"snapshot-ctm", "ema-0.9-ctm", "ema-power_0.05-ctm", "ema-power_0.1-ctm"}
    expected = {f"{kind}-{step:06d}.safetensors" for kind in kept for step in (8, 12)}
    assert {path.name for path in run.glob("*.safetensors")} == {*expected, "snapshot-teacher-000004.safetensors"}


def test_keep_goes_by_steps_and_leaves_other_stages(config: RunConfig, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path, config)
    names = [run.snapshot("ctm", step).name for step in (999_999, 1_000_000, 5)]
    names += [run.average("0.9", "ctm", 5).name, run.average("0.9", "ctm", 1_000_000).name, "ema-of-mine.safetensors"]
    for name in (*names, run.snapshot("teacher", 1).name):
        (run.path / name).touch()
    run.prune("ctm", 1)
    left = {names[1], names[4], names[5], run.snapshot("teacher", 1).name}
    assert {path.name for path in run.path.glob("*.safetensors")} == left


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_is_positive(config: RunConfig, tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=rf"--keep: expected a number from 1 on, got {keep}"):
        train(config, tmp_path / "runs", CPU, keep=keep)
    assert not (tmp_path / "runs").exists()


class Watched(TeacherStage):
    """Notes what training could depend on, before each step."""

    def train_step(self, step: int) -> dict[str, torch.Tensor]:
        modes = [[module.training for module in model.modules()] for model in (self.model, self.ema)]
        self.seen.append((copy.deepcopy(self.state()), torch.random.get_rng_state(), modes))
        return super().train_step(step)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_evaluation_and_grids_change_nothing(config: RunConfig, data: Path, tmp_path: Path) -> None:
    """Weights, averages, optimizer, random state and modes before every step, bit for bit."""
    dataset = load_dataset(data, resolution=8, labels=True)
    seen = []
    for keys in (["snapshot_every=99"], ["snapshot_every=99", "preview_kimg=0.008", "evaluate_kimg=0.008"]):
        chosen = override(config, ["teacher.emas=0.9", *keys])
        run = RunDirectory.open(tmp_path, chosen)
        regions = Regions(compile=False, device=CPU.device)
        stage = Watched(chosen, dataset, CPU, regions)
        stage.seen = []
        run_stage(stage, run, regions.timer, 0, reference=Reference.of(chosen, dataset, CPU.device))
        assert len(lines(run.path, "evaluation", "teacher")) == (4 if len(keys) > 1 else 0)
        seen.append([*stage.seen, (stage.state(), torch.random.get_rng_state(), [])])
    assert len(seen[0]) == 5 and equal(*seen)
