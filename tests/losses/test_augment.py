"""DiffAugment: each distortion by hand, its draws, and its gradient."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ctm_fast.losses.augment import HOLE, SHIFT, AugmentDraws, _integers, diff_augment, draw_augment, pixels

STREAM = 0x100


def nothing(batch: int, size: int) -> AugmentDraws:
    """Draws that change nothing but for the cutout, which lies beyond the image."""
    zeros = torch.zeros(batch)
    place = torch.zeros(batch, 2, dtype=torch.int64)
    return AugmentDraws(zeros, zeros + 1, zeros + 1, place, place + 10 * size)


def draws_of(batch: int, size: int, step: int = 0) -> AugmentDraws:
    return draw_augment(torch.arange(batch) + (7 << 32), step, size, size, stream=STREAM)


def test_sizes_of_the_published_code() -> None:
    assert [pixels(SHIFT, size) for size in (32, 64)] == [4, 8]
    assert [pixels(HOLE, size) for size in (32, 64)] == [6, 13]


def test_nothing(generator: torch.Generator) -> None:
    x = torch.rand(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(diff_augment(x, nothing(2, 8)), x)


def test_colours(generator: torch.Generator) -> None:
    x = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    b, s, c = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, -0.25], [0.0, 1.7], [0.5, 1.4]))
    shape = (2, 1, 1, 1)
    draws = nothing(2, 8)
    torch.testing.assert_close(diff_augment(x, replace(draws, brightness=b)), x + b.view(shape))
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(diff_augment(x, replace(draws, saturation=s)), grey + (x - grey) * s.view(shape))
    mean = x.flatten(1).mean(1).view(shape)
    torch.testing.assert_close(diff_augment(x, replace(draws, contrast=c)), mean + (x - mean) * c.view(shape))
    together = grey + b.view(shape) + (x - grey) * s.view(shape)
    about = mean + b.view(shape)
    got = diff_augment(x, AugmentDraws(b, s, c, draws.shift, draws.hole))
    torch.testing.assert_close(got, about + (together - about) * c.view(shape))


def test_saturation_leaves_grey_images_alone(generator: torch.Generator) -> None:
    x = torch.rand(1, 1, 8, 8, generator=generator)
    torch.testing.assert_close(diff_augment(x, replace(nothing(1, 8), saturation=torch.tensor([0.3]))), x)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9)], ids=str)
def test_translation_and_cutout(shape: tuple[int, int], generator: torch.Generator) -> None:
    height, width = shape
    x = torch.rand(4, 3, height, width, generator=generator)
    shift = torch.tensor([[1, 0], [0, -1], [-1, 1], [0, 0]])
    hole = torch.tensor([[0, 0], [height, width], [2, 4], [1, 3]])
    sides = pixels(0.2, height), pixels(0.2, width)
    expected = torch.zeros_like(x)
    for b in range(4):
        for row in range(height):
            for column in range(width):
                y, z = row - int(shift[b, 0]), column - int(shift[b, 1])
                offsets = [p - int(h) + side // 2 for p, h, side in zip((row, column), hole[b], sides, strict=True)]
                cut = all(0 <= offset < side for offset, side in zip(offsets, sides, strict=True))
                if 0 <= y < height and 0 <= z < width and not cut:
                    expected[b, :, row, column] = x[b, :, y, z]
    draws = replace(nothing(4, 8), shift=shift, hole=hole)
    torch.testing.assert_close(diff_augment(x, draws), expected)
    assert torch.equal(diff_augment(x, draws) == 0, expected == 0)


@pytest.mark.parametrize(("size", "reach", "last"), [(32, 4, 32), (64, 8, 63), (8, 1, 8)])
def test_draws_are_uniform(size: int, reach: int, last: int) -> None:
    """Every value that may come does, as often as the others (5 standard deviations of 20,000 draws)."""
    count = 20_000
    draws = draws_of(count, size)
    for values, low, high in [(draws.shift, -reach, reach), (draws.hole, 0, last)]:
        for axis in (0, 1):
            counts = torch.bincount(values[:, axis] - low)
            chance = 1 / (high - low + 1)
            assert len(counts) == high - low + 1
            assert ((counts - count * chance).abs() < 5 * (count * chance) ** 0.5).all()
    for value, low, high in [
        (draws.brightness, -0.5, 0.5), (draws.saturation, 0, 2), (draws.contrast, 0.5, 1.5),
    ]:  # fmt: skip
        assert value.dtype == torch.float32
        assert low <= value.min() < low + 0.01 and high - 0.01 < value.max() <= high
        deviation = (high - low) / 12**0.5
        assert value.mean().item() == pytest.approx((low + high) / 2, abs=5 * deviation / count**0.5)
        assert value.std().item() == pytest.approx(deviation, rel=0.03)
    table = torch.stack(
        [draws.brightness, draws.saturation, draws.contrast, *draws.shift.T.float(), *draws.hole.T.float()]
    )
    correlations = torch.corrcoef(table) - torch.eye(7)
    assert correlations.abs().max() < 5 / count**0.5


def test_the_largest_word_is_the_largest_integer() -> None:
    words = torch.tensor([0, 2**32 - 1])
    for count in (9, 17, 33, 64):
        assert _integers(words, count).tolist() == [0, count - 1]


def test_draws_depend_on_seed_step_and_stream_alone() -> None:
    whole, again = draws_of(6, 32), draws_of(6, 32)
    other = draws_of(6, 32, step=1)
    stream = draw_augment(torch.arange(6) + (7 << 32), 0, 32, 32, stream=STREAM + 1)
    part = draw_augment(torch.arange(2, 5) + (7 << 32), 0, 32, 32, stream=STREAM)
    for field in fields(AugmentDraws):
        value = getattr(whole, field.name)
        assert torch.equal(value, getattr(again, field.name))
        assert torch.equal(value[2:5], getattr(part, field.name))
        assert not torch.equal(value, getattr(other, field.name))
        assert not torch.equal(value, getattr(stream, field.name))


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient(channels: int, generator: torch.Generator) -> None:
    """Against finite differences, first and second derivative."""
    x = torch.rand(3, channels, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    draws = draw_augment(torch.arange(3), 4, 6, 5, stream=STREAM)
    draws = replace(draws, shift=torch.tensor([[1, -1], [0, 2], [-1, 0]]))

    def function(x: Tensor) -> Tensor:
        return diff_augment(x, draws)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), (x,))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[2, C, H, W\], got \[3, 1, 8, 8\]"):
        diff_augment(torch.zeros(3, 1, 8, 8), nothing(2, 8))
