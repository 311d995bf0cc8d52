"""Samplers of the experiments: how often they ask the network, and from where to where they go."""

from pathlib import Path

import pytest
import torch

from ctm_fast.diffusion.images import to_uint8
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.experiments import sampling
from ctm_fast.experiments.sampling import Solver, jump_samples, solver_samples
from ctm_fast.models import CTM, EDMDenoiser, load_model
from ctm_fast.samplers import initial_noise
from tests.snapshots import save_snapshot

LEVELS = Levels()


@pytest.fixture
def teacher(tmp_path: Path) -> CTM | EDMDenoiser:
    return load_model(save_snapshot(tmp_path / "teacher.safetensors", EDMDenoiser))[0]


@pytest.fixture
def student(tmp_path: Path) -> CTM:
    model = load_model(save_snapshot(tmp_path / "ctm.safetensors", CTM))[0]
    assert isinstance(model, CTM)
    return model


def calls(model: CTM | EDMDenoiser) -> list[int]:
    """Grows by one at each evaluation of the network."""
    found: list[int] = []
    model.net.register_forward_hook(lambda *_: found.append(1))
    return found


@pytest.mark.parametrize(
    ("solver", "nfe"), [("Euler", 1), ("Euler", 4), ("DPM-Solver++", 2), ("DPM-Solver++", 4), ("Heun", 3), ("Heun", 7)]
)
def test_evaluations(teacher: EDMDenoiser, solver: Solver, nfe: int) -> None:
    found = calls(teacher)
    images, labels = solver_samples(teacher, LEVELS, 12, solver, nfe=nfe)
    assert len(found) == nfe
    assert images.dtype == torch.uint8 and images.shape == (12, 1, 8, 8)
    assert labels.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("nfe", [1, 3])
def test_evaluations_of_jumps(student: CTM, nfe: int) -> None:
    found = calls(student)
    jump_samples(student, LEVELS, 3, nfe=nfe, gamma=0.5)
    assert len(found) == nfe


def test_one_euler_step_is_the_denoiser(teacher: EDMDenoiser) -> None:
    seeds = torch.arange(5)
    x_T = initial_noise(seeds, (1, 8, 8), LEVELS)
    expected = to_uint8(teacher.denoise(x_T, torch.full((5,), LEVELS.sigma_max), seeds))
    assert torch.equal(solver_samples(teacher, LEVELS, 5, "Euler", nfe=1)[0], expected)


def test_batches_leave_the_samples_alone(student: CTM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jump_samples(student, LEVELS, 7, nfe=2, gamma=1.0)[0]
    monkeypatch.setattr(sampling, "BATCH", 3)
    parts = jump_samples(student, LEVELS, 7, nfe=2, gamma=1.0)[0]
    assert (whole.int() - parts.int()).abs().max() <= 1


@pytest.mark.parametrize(("solver", "nfe"), [("Heun", 4), ("Heun", 1), ("DPM-Solver++", 1), ("Euler", 0)])
def test_evaluations_that_no_solver_makes(teacher: EDMDenoiser, solver: Solver, nfe: int) -> None:
    with pytest.raises(ValueError, match="nfe: expected"):
        solver_samples(teacher, LEVELS, 1, solver, nfe=nfe)
