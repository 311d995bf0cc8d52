"""``python -m ctm_fast.playground``: what is drawn is what the samplers give."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctm_fast import playground
from ctm_fast.analytic import Gaussian, World
from ctm_fast.diffusion.schedule import Levels
from tests.command_line import assert_refused, call, tree

LEVELS = Levels(sigma_max=2.0)


@pytest.mark.parametrize("name", list(playground.worlds()))
def test_ways_of_the_ode_end_where_the_samples_are(name: str) -> None:
    world: World = playground.worlds()[name]
    x = world.sample(20, torch.Generator().manual_seed(0), level=2.0)
    ends, stretches = playground.draw_ode(world, x, LEVELS)
    for i, (points, colour) in enumerate(stretches):
        assert colour is not None
        np.testing.assert_allclose(points[0], x[i].flatten().numpy())
        np.testing.assert_allclose(points[-1], ends[i].numpy(), atol=1e-7)


def test_jumps_and_noise_are_one_way() -> None:
    """Each coloured jump begins where the noise before it ended; without noise there is none, and the ODE's end."""
    world = playground.worlds()["rotated"]
    x = world.sample(20, torch.Generator().manual_seed(0), level=2.0)
    few = 7
    for gamma, rounds in ((0.0, 3), (0.5, 5)):
        ends, stretches = playground.draw_gamma(world, x, LEVELS, gamma=gamma, steps=3, seed=1)
        assert len(stretches) == few * rounds
        for i in range(few):
            own = stretches[i::few]
            assert [colour is None for _, colour in own] == ([False] * 3 if gamma == 0 else [False, True] * 2 + [False])
            for (before, _), (after, _) in itertools.pairwise(own):
                np.testing.assert_allclose(after[0], before[-1], atol=1e-6)
            np.testing.assert_allclose(own[-1][0][-1], ends[i].numpy(), atol=1e-6)
        if gamma == 0:
            torch.testing.assert_close(ends, playground.draw_ode(world, x, LEVELS)[0], rtol=0, atol=1e-7)


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ways.png"
    argv = ["--world", "isotropic", "--gamma", "0", "1", "--steps", "2", "--out", str(out)]
    assert call(playground.main, argv, monkeypatch, capsys) == (0, f"{out}\n", "")
    with Image.open(out) as image:
        assert image.size == (2 * playground.PANEL, 2 * playground.PANEL)
        pixels = np.asarray(image)
    panels = [pixels[: playground.PANEL, : playground.PANEL], pixels[playground.PANEL :, playground.PANEL :]]
    assert panels[0].std() > 5
    assert (panels[1] == 255).all(), "three panels leave the fourth white"


BAD = [
    ("--world flat", "argument --world: ", "'flat'"),
    ("--gamma 2", "gamma: ", "got 2.0"),
    ("--steps 0", "steps: ", "got 0"),
    ("--sigma-max 0.001", "sigma_min, sigma_max: ", "got 0.002, 0.001"),
    ("--seed -1", "--seed: ", "got -1"),
    ("--out ways.jpeg", "--out: ", "expected a .png, got ways.jpeg"),
    ("--out nowhere/ways.png", "--out: ", "got nowhere/ways.png"),
    ("--threads 0", "--threads: ", "got 0"),
]


@pytest.mark.parametrize(("words", "names", "part"), BAD)
def test_refused(
    words: str,
    names: str,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--world", "isotropic", "--out", "ways.png", *words.split(" ")]
    assert_refused(call(playground.main, argv, monkeypatch, capsys), names, part)
    assert tree(tmp_path) == {}


def test_up_is_up() -> None:
    """A world to the right and above: its density and its samples are there in the panel, not mirrored."""
    world = Gaussian(torch.tensor([0.3, 0.6]), 0.01 * torch.eye(2), playground.SHAPE)
    density = playground._density(world, 1.0)
    blank = Image.new("RGB", density.size, "white")
    at = torch.tensor([[0.3, 0.6]]).double().repeat(7, 1)
    for image in (density, playground._panel(blank, "", 1.0, at, [])):
        dark = 255 - np.asarray(image.convert("L"), dtype=float)[4:-4, 4:-4]
        rows, columns = (np.average(np.arange(dark.shape[0]), weights=dark.sum(axis)) for axis in (1, 0))
        assert columns / dark.shape[1] == pytest.approx(0.65, abs=0.02)
        assert rows / dark.shape[0] == pytest.approx(0.2, abs=0.02)
