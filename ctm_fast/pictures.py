"""Pictures with NumPy and Pillow alone: grids of images, and curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ctm_fast.files import atomic_write

WIDTH, HEIGHT = 960, 540
SUPERSAMPLING = 2  # drawn at this multiple and averaged down, which smooths the lines

# Okabe and Ito's palette, which colour-blind readers tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK, _GREY, _GRID = "#222222", "#666666", "#E4E4E4"
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 28, 52, 60  # margins around plot and legend
_GAP = 2  # white pixels between the images of a grid

Curve = tuple[Sequence[float], Sequence[float]]
Point = tuple[float, float]


def image_grid(images: NDArray[np.uint8], *, columns: int, scale: int = 1) -> Image.Image:
    """Images [N, H, W, C] uint8, C 1 or 3, in rows of ``columns``, a pixel being a square of ``scale``.

    White lines part the images; places left over in the last row are white.

    Raises ValueError for another dtype or shape, no image, or columns or scale below 1.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise ValueError(
            "images: expected uint8 [N, H, W, C] with N at least 1 and C 1 or 3, "
            f"got {images.dtype} {list(images.shape)}"
        )
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    height, width = height * scale + _GAP, width * scale + _GAP
    tiles = np.full((rows * columns, height, width, channels), 255, np.uint8)
    tiles[:n, :-_GAP, :-_GAP] = images.repeat(scale, 1).repeat(scale, 2)
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * height, columns * width, channels)[:-_GAP, :-_GAP]
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write ``path`` as a PNG, whatever its suffix, whole or not at all. Raises OSError where it cannot be written."""
    atomic_write(path, lambda file: image.save(file, "PNG"))


def line_plot(curves: Mapping[str, Curve], *, title: str, xlabel: str, ylabel: str, log_y: bool = False) -> Image.Image:
    """Curves by name, each (xs, ys) of equal length, in one plot of 960x540 with axes, ticks and a legend.

    A point that is not finite, or not positive where ``log_y``, leaves a gap; a point alone between gaps is a dot.
    Curves without any point keep their place in the legend; with no point at all the axes say so.

    Raises ValueError where xs and ys differ in length.
    """
    for name, (xs, ys) in curves.items():
        if len(xs) != len(ys):
            raise ValueError(f"curves: expected xs and ys of one length, got {len(xs)} and {len(ys)} for {name!r}")
    runs = {name: _runs(curve, log_y) for name, curve in curves.items()}
    points = [point for pieces in runs.values() for piece in pieces for point in piece]
    canvas = _Canvas()
    right = WIDTH - _RIGHT - _draw_legend(canvas, list(runs))
    middle = (_LEFT + right) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    canvas.text((middle[0], _TOP / 2), title, 19, "mm", INK)
    canvas.text((middle[0], HEIGHT - 18), xlabel, 15, "mm", INK)
    canvas.text_upwards((20, middle[1]), ylabel, 15, INK)
    if points:
        x_axis = _Axis(min(x for x, _ in points), max(x for x, _ in points), _LEFT, right, log=False)
        y_axis = _Axis(min(y for _, y in points), max(y for _, y in points), HEIGHT - _BOTTOM, _TOP, log=log_y)
        _draw_axes(canvas, x_axis, y_axis)
        for colour, pieces in zip(_colours(len(runs)), runs.values(), strict=True):
            for piece in pieces:
                canvas.curve([(x_axis.place(x), y_axis.place(y)) for x, y in piece], colour)
    else:
        canvas.text(middle, "no points", 15, "mm", _GREY)
    canvas.frame((_LEFT, _TOP, right, HEIGHT - _BOTTOM), _GREY)
    return canvas.picture()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _runs(curve: Curve, log_y: bool) -> list[list[Point]]:
    """The stretches of a curve that can be drawn, between the points that cannot."""
    pieces: list[list[Point]] = [[]]
    for x, y in zip(*curve, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y):
            pieces[-1].append((float(x), float(y)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


class _Axis:
    """Values low..high on pixels start..stop, with a little air, and where its ticks are."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool) -> None:
        self.log = log
        low, high = self._scale(low), self._scale(high)
        air = 0.04 * (high - low) or (0.5 if log else 0.5 * abs(low) or 0.5)
        self.low, self.high = low - air, high + air
        self.start, self.stop = start, stop

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label): powers of ten, with 2 and 5 between them if they are few; or steps of 1, 2 or 5."""
        if self.log and self.high - self.low >= 1:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = math.ceil(len(decades) / 8)
            factors = (1, 2, 5) if len(decades) <= 4 else (1,)
            values = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
            labels = [f"{value:g}" for value in values]
        else:
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            step = _round_step((high - low) / 6)
            first, last = math.ceil(low / step), math.floor(high / step)
            values = [i * step for i in range(first, last + 1)]
            labels = _labels(values, step)
        return [
            (value, label)
            for value, label in zip(values, labels, strict=True)
            if self.low <= self._scale(value) <= self.high
        ]


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below ``step``."""
    magnitude = 10.0 ** math.floor(math.log10(step))
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= step * (1 - 1e-9))


def _labels(values: list[float], step: float) -> list[str]:
    """Labels of one form: as many decimals as the step has, thousands as k and millions as M."""
    largest = max(map(abs, values), default=0.0)
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit:
            return [f"{value / unit:.6g}{suffix if value else ''}" for value in values]
    if largest >= 1e15 or step < 1e-5:
        return [f"{value:.4g}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:.{decimals}f}" for value in values]


def _draw_axes(canvas: "_Canvas", x_axis: _Axis, y_axis: _Axis) -> None:
    for value, label in x_axis.ticks():
        x = x_axis.place(value)
        canvas.line([(x, y_axis.start), (x, y_axis.stop)], 1, _GRID)
        canvas.text((x, y_axis.start + 8), label, 13, "ma", _GREY)
    for value, label in y_axis.ticks():
        y = y_axis.place(value)
        canvas.line([(x_axis.start, y), (x_axis.stop, y)], 1, _GRID)
        canvas.text((x_axis.start - 8, y), label, 13, "rm", _GREY)


def _draw_legend(canvas: "_Canvas", names: list[str]) -> float:
    """Draw it beside the plot, where it hides no curve; returns the width that it takes."""
    if not names:
        return 0
    width = 44 + max(canvas.text_width(name, 14) for name in names)
    left = WIDTH - _RIGHT - width
    for i, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        y = _TOP + 22 * (i + 0.5)
        canvas.line([(left + 16, y), (left + 36, y)], 3, colour)
        canvas.text((left + 44, y), name, 14, "lm", INK)
    return width


class _Canvas:
    """A white picture of WIDTH x HEIGHT, drawn at SUPERSAMPLING times that; all units are pixels of the result."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), "white")
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> Image.Image:
        return self._image.reduce(SUPERSAMPLING)

    def line(self, points: list[Point], width: float, colour: str) -> None:
        self._draw.line(_up(points), colour, round(width * SUPERSAMPLING), joint="curve")

    def curve(self, points: list[Point], colour: str) -> None:
        if len(points) == 1:
            (x, y), radius = points[0], 3
            self._draw.ellipse(_up([(x - radius, y - radius), (x + radius, y + radius)]), colour)
        self.line(points, 2, colour)

    def frame(self, box: tuple[float, float, float, float], colour: str) -> None:
        self._draw.rectangle(_up([box[:2], box[2:]]), outline=colour, width=SUPERSAMPLING)

    def text(self, at: Point, text: str, size: int, anchor: str, colour: str) -> None:
        self._draw.text(_up([at])[0], text, colour, _font(size), anchor)

    def text_upwards(self, at: Point, text: str, size: int, colour: str) -> None:
        """Text centred on ``at``, read from bottom to top."""
        strip = Image.new("L", (self._image.height, 2 * size * SUPERSAMPLING))
        ImageDraw.Draw(strip).text((strip.width / 2, strip.height / 2), text, 255, _font(size), "mm")
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        x, y = _up([at])[0]
        corner = round(x - strip.width / 2), round(y - strip.height / 2)
        self._image.paste(colour, (*corner, corner[0] + strip.width, corner[1] + strip.height), strip)

    def text_width(self, text: str, size: int) -> float:
        return self._draw.textlength(text, _font(size)) / SUPERSAMPLING


def _up(points: Sequence[Point]) -> list[Point]:
    return [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SUPERSAMPLING)
