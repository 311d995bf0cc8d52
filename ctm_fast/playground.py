"""``python -m ctm_fast.playground``: the exact ODE and gamma-sampling in an analytic world of two dimensions, drawn.

Whatever takes a ``jump(x, t, s)`` or a ``denoise(x, sigma)`` runs in such a world as it runs on a network: write a
sampler of your own against :class:`ctm_fast.analytic.World`, and see it beside these.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ctm_fast import runtime
from ctm_fast.analytic import Gaussian, GaussianMixture, World, trajectory
from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.errors import ConfigError
from ctm_fast.files import check_output
from ctm_fast.pictures import COLOURS, INK, save_png
from ctm_fast.samplers import gamma_sample, renoise_with

SHAPE = (1, 1, 2)
"""Of an image: one channel, one row, two pixels, which are the two coordinates."""

PANEL, SUPERSAMPLING = 480, 2
_SAMPLES, _POINTS = 1000, 64
_COLOURS = (*COLOURS, INK)
_DENSEST = np.array([158.0, 185.0, 212.0])  # colour of the background where the data are densest; white where none are

Stretch = tuple[NDArray[np.float64], str | None]
"""Points [K, 2] of a way, and its colour, None for noise."""


def worlds() -> dict[str, World]:
    """The worlds by name: two pixels each, of about unit size."""
    square = [(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]
    tight = 0.03 * torch.eye(2, dtype=torch.float64)
    return {
        "isotropic": Gaussian.isotropic(0.5, SHAPE),
        "rotated": Gaussian.rotated((1.0, 0.05), SHAPE, seed=0),
        "mixture": GaussianMixture(
            [1.0, 2.0, 2.0, 3.0], [Gaussian(torch.tensor(mean), tight, SHAPE) for mean in square]
        ),
    }


def draw_ode(world: World, x: Tensor, levels: Levels) -> tuple[Tensor, list[Stretch]]:
    """Where the ODE takes x [B, 1, 1, 2] from sigma_max, [B, 2] at sigma_min, and the ways of the first few."""
    bottom, top = (x.new_full((len(x),), sigma) for sigma in (levels.sigma_min, levels.sigma_max))
    ways = _ways(world, x, karras_sigmas(_POINTS, levels).tolist())
    return world.jump(x, top, bottom).view(-1, 2), ways


def draw_gamma(
    world: World, x: Tensor, levels: Levels, *, gamma: float, steps: int, seed: int
) -> tuple[Tensor, list[Stretch]]:
    """As :func:`draw_ode` for gamma-sampling in ``steps`` exact jumps: curves are jumps, straight lines noise."""
    generator = torch.Generator().manual_seed(seed)
    stretches: list[Stretch] = []

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        stretches.extend(_ways(world, x, np.geomspace(float(t[0]), float(s[0]), _POINTS).tolist()))
        return world.jump(x, t, s)

    def noise(i: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    renoise = renoise_with(jump, noise)

    def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
        x_next = renoise(x, t, s, t_next, i)
        ends = [points[-1] for points, _ in stretches[-len(_COLOURS) :]]
        stretches.extend((np.stack(line), None) for line in zip(ends, x_next.view(-1, 2).numpy(), strict=False))
        return x_next

    x = gamma_sample(jump, x, sampler_sigmas(steps, levels).tolist(), gamma=gamma, jump_renoise=jump_renoise)
    return x.view(-1, 2), stretches


def _ways(world: World, x: Tensor, sigmas: Sequence[float]) -> list[Stretch]:
    """The first few of x through ``sigmas``, a colour each."""
    few = len(_COLOURS)
    way = trajectory(world, x[:few], sigmas).view(len(sigmas), few, 2).numpy()
    return [(way[:, i], colour) for i, colour in enumerate(_COLOURS)]


def picture(
    world: World, *, gammas: Sequence[float] = (0.0, 0.5, 1.0), steps: int = 4, sigma_max: float = 2.0, seed: int = 0
) -> Image.Image:
    """The ODE and gamma-sampling for each of ``gammas``, side by side, two panels a row.

    Every panel starts at the same points x of the world at ``sigma_max``: dots are where they end, over the density of
    the data; a few have their ways drawn, from a ring.

    Raises LevelError for a gamma, a number of steps or a level out of range.
    """
    levels = Levels(sigma_max=sigma_max)
    x = world.sample(_SAMPLES, torch.Generator().manual_seed(seed), level=sigma_max)
    panels: list[tuple[str, Callable[[], tuple[Tensor, list[Stretch]]]]] = [
        (f"the ODE from sigma = {sigma_max:g}", partial(draw_ode, world, x, levels))
    ]
    for gamma in gammas:
        title = f"gamma = {gamma:g}, {steps} exact jump{'' if steps == 1 else 's'}"
        panels.append((title, partial(draw_gamma, world, x, levels, gamma=gamma, steps=steps, seed=seed)))
    data = world.sample(_SAMPLES, torch.Generator().manual_seed(seed))
    reach = 1.6 * float(data.abs().max())
    background = _density(world, reach)
    rows = math.ceil(len(panels) / 2)
    whole = Image.new("RGB", (2 * PANEL, rows * PANEL), "white")
    for i, (title, draw) in enumerate(panels):
        whole.paste(_panel(background, title, reach, *draw()), (PANEL * (i % 2), PANEL * (i // 2)))
    return whole


def _density(world: World, reach: float) -> Image.Image:
    """The data's density as a background, x to the right and y upwards."""
    axis = torch.linspace(-reach, reach, PANEL, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, -axis, indexing="xy"), -1).view(-1, *SHAPE)
    log_density = world.log_prob(grid, torch.zeros(len(grid))).view(PANEL, PANEL, 1).numpy()
    share = np.exp(0.5 * (log_density - log_density.max()))  # the root shows tails
    return Image.fromarray(np.rint(255 + share * (_DENSEST - 255)).astype(np.uint8))


def _panel(background: Image.Image, title: str, reach: float, ends: Tensor, stretches: list[Stretch]) -> Image.Image:
    size = PANEL * SUPERSAMPLING
    image = background.resize((size, size))
    draw = ImageDraw.Draw(image)

    def place(points: NDArray[np.float64]) -> list[tuple[float, float]]:
        return [((1 + float(x) / reach) * size / 2, (1 - float(y) / reach) * size / 2) for x, y in points]

    for x, y in place(ends.numpy()):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), "#6B7C8C")
    for points, colour in stretches:
        for begin, end in itertools.pairwise(place(points)):
            draw.line((*begin, *end), colour or "#B0B0B0", 3 if colour else 2)
    for points, colour in stretches[: len(_COLOURS)]:
        ((x, y),) = place(points[:1])
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), "white", colour, 3)
    for (x, y), colour in zip(place(ends[: len(_COLOURS)].numpy()), _COLOURS, strict=True):
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), colour, "white", 2)
    draw.text((16, 14), title, "#222222", ImageFont.load_default(16 * SUPERSAMPLING))
    draw.rectangle((0, 0, size - 1, size - 1), outline="#666666", width=SUPERSAMPLING)
    return image.reduce(SUPERSAMPLING)


def main() -> None:
    arguments = _parser().parse_args()
    out: Path = arguments.out
    check_output("--out", out, ".png")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed: expected 0 to 2^63 - 1, got {arguments.seed}")
    runtime.prepare(arguments.threads)
    drawn = picture(
        worlds()[arguments.world],
        gammas=arguments.gamma,
        steps=arguments.steps,
        sigma_max=arguments.sigma_max,
        seed=arguments.seed,
    )
    save_png(drawn, out)
    print(out)


def _parser() -> runtime.Parser:
    parser = runtime.Parser(prog="python -m ctm_fast.playground", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--world", choices=tuple(worlds()), default="mixture", help="of the data (default: mixture)")
    add("--gamma", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="a panel for each (default: 0 0.5 1)")
    add("--steps", type=int, default=4, help="jumps of gamma-sampling (default: 4)")
    add("--sigma-max", type=float, default=2.0, help="where all start (default: 2)")
    add("--seed", type=int, default=0, help="of where they start, and of the noise (default: 0)")
    add("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    add("--threads", type=int, default=runtime.default_threads(), help="CPU threads (default: half of the cores)")
    return parser


if __name__ == "__main__":
    runtime.run(main)
