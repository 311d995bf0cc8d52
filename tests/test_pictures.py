"""Grids put every pixel in its place; plots draw every curve where its values are."""

import math

import numpy as np
import pytest
from PIL import Image

from ctm_fast.pictures import HEIGHT, WIDTH, image_grid, line_plot, save_png

BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
LABELS = {"title": "title", "xlabel": "x", "ylabel": "y"}


def near(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Where in the plot's frame, [H, W], the picture has the colour."""
    pixels = np.asarray(picture).astype(int)
    return (np.abs(pixels - colour) < 30).all(2)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(channels):
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, channels), dtype=np.uint8)
    grid = np.asarray(image_grid(images, columns=3, scale=2)).reshape(2 * 8 + 2, 3 * 12 + 4, channels)
    covered = np.zeros(grid.shape, bool)
    for i, image in enumerate(images):
        place = np.s_[10 * (i // 3) : 10 * (i // 3) + 8, 14 * (i % 3) : 14 * (i % 3) + 12]
        np.testing.assert_array_equal(grid[place][::2, ::2], image)
        np.testing.assert_array_equal(grid[place][1::2, 1::2], image)
        covered[place] = True
    assert (grid[~covered] == 255).all()


def test_grid_of_fewer_images_than_columns():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    assert image_grid(images, columns=5).size == (5 * 4 + 4 * 2, 4)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 4, 4, 1)), {"columns": 1}, "images: expected uint8"),
        (np.zeros((2, 4, 4), np.uint8), {"columns": 1}, "images: expected uint8"),
        (np.zeros((2, 4, 4, 2), np.uint8), {"columns": 1}, "C 1 or 3"),
        (np.zeros((0, 4, 4, 1), np.uint8), {"columns": 1}, "N at least 1"),
        (np.zeros((2, 4, 4, 1), np.uint8), {"columns": 0}, "columns: expected at least 1, got 0"),
        (np.zeros((2, 4, 4, 1), np.uint8), {"columns": 1, "scale": 0}, "scale: expected at least 1, got 0"),
    ],
)
def test_grid_refuses(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def test_save_png(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    save_png(image_grid(images, columns=1), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), images[0])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("log_y", [False, True])
def test_a_straight_line_is_straight(log_y):
    xs = np.linspace(0, 10, 50)
    ys = 10**xs if log_y else 3 * xs
    picture = line_plot({"": (xs, ys)}, log_y=log_y, **LABELS)
    assert picture.size == (WIDTH, HEIGHT)
    rows, columns = np.nonzero(near(picture, BLUE)[:, : WIDTH - 80])  # right of that is the legend
    slope, intercept = np.polyfit(columns, rows, 1)
    assert slope < 0
    assert np.abs(rows - (slope * columns + intercept)).max() < 2
    assert columns.max() - columns.min() > 0.75 * WIDTH
    assert rows.max() - rows.min() > 0.6 * HEIGHT


def test_curves_keep_their_order():
    picture = line_plot({"low": ([0, 1], [1, 1]), "high": ([0, 1], [2, 2])}, **LABELS)
    low, high = (np.nonzero(near(picture, colour)[:, 300:600])[0] for colour in (BLUE, VERMILION))
    assert high.max() < low.min()


@pytest.mark.parametrize("gap", [math.nan, math.inf, 0.0, -1.0])
def test_points_that_cannot_be_drawn_leave_a_gap(gap):
    ys = [1.0, 1.0, gap, 1.0, 1.0]
    drawn = near(line_plot({"": (range(5), ys)}, log_y=True, **LABELS), BLUE)[:, : WIDTH - 80].any(0)
    columns = np.nonzero(drawn)[0]
    middle = (columns.min() + columns.max()) // 2
    assert not drawn[middle - 100 : middle + 100].any()
    assert drawn[columns.min() + 5 : middle - 250].all()


def test_a_single_point_is_a_dot():
    drawn = near(line_plot({"": ([3], [5])}, **LABELS), BLUE)[:, : WIDTH - 80]
    assert 10 < drawn.sum() < 60


@pytest.mark.parametrize(
    "ys",
    [[0.0] * 3, [1e-300] * 3, [1e300, -1e300, 0], [1, 1 + 1e-15, 1], [1e9, 2e9, 3e9], [-5, 0, 5], [2, 2.1, 2.2]],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_any_range_has_axes(ys, log_y):
    picture = line_plot({"": ([0, 1, 2], ys)}, log_y=log_y, **LABELS)
    drawable = [y for y in ys if y > 0 or not log_y]
    assert near(picture, BLUE)[:, : WIDTH - 80].any() == bool(drawable)


def test_no_curves_and_empty_curves():
    for curves in ({}, {"a": ([], [])}):
        assert line_plot(curves, **LABELS).size == (WIDTH, HEIGHT)


def test_lengths_differ():
    with pytest.raises(ValueError, match="curves: expected xs and ys of one length, got 2 and 1 for 'a'"):
        line_plot({"a": ([1, 2], [1])}, **LABELS)
