"""The pictures of the recorded benchmarks."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import DIRECTIONS, headlines
from benchmarks.recording import RESULTS
from ctm_fast.errors import ConfigError

pytest.importorskip("matplotlib", reason="the pictures are Matplotlib's")
from PIL import Image  # after the check, whose skip is for Matplotlib alone

from benchmarks import plot

COMMITTED = sorted(RESULTS.glob("*.json"))


@pytest.fixture(params=COMMITTED, ids=lambda path: path.stem)
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_every_op_and_way_is_a_bar(content: dict[str, Any]) -> None:
    """As long as its share, with its time beside it."""
    panels = plot.draw(content).axes
    directions = [direction for direction in DIRECTIONS if headlines(content["results"], direction)]
    assert [axes.get_title(loc="left") for axes in panels] == directions
    for axes, direction in zip(panels, directions, strict=True):
        cases = headlines(content["results"], direction)
        expected = sorted(figures["share"] for case in cases for figures in case.ways.values())
        bars = sorted(bar.get_width() for bar in axes.patches if bar.get_width() > 0)
        assert bars == pytest.approx(expected)
        assert [label.get_text().partition("\n")[0] for label in axes.get_yticklabels()] == [case.op for case in cases]
        times = {text.get_text() for text in axes.texts}
        assert {f"{f['median seconds'] * 1e6:,.0f} µs" for case in cases for f in case.ways.values()} == times


def test_nothing_lies_over_anything(content: dict[str, Any]) -> None:
    """No two texts of the picture overlap."""
    figure = plot.draw(content)
    figure.canvas.draw()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, axes._left_title]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for number, (name, box) in enumerate(boxes):
        for other, other_box in boxes[number + 1 :]:
            assert not box.overlaps(other_box), f"{name!r} lies over {other!r}"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_picture_in_the_repository_is_of_these_results(path: Path) -> None:
    picture = plot.picture(path)
    assert picture.exists(), "run python -m benchmarks.plot"
    with Image.open(picture) as image:
        assert image.text["Description"] == plot.identity(json.loads(path.read_text())), "run python -m benchmarks.plot"


def test_results_without_an_op(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected figures of at least one op, got none"):
        plot.draw(content | {"results": {}})
