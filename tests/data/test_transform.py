"""The crops of the published data sets, against other formulations of the same rules."""

import numpy as np
import pytest
from PIL import Image

from ctm_fast.data import TRANSFORMS
from ctm_fast.data.decode import Misfit

SIZES = [(500, 375), (375, 500), (64, 64), (65, 129), (129, 65), (300, 300), (31, 40), (128, 64), (63, 200)]
"""(width, height)"""


def photograph(size: tuple[int, int]) -> Image.Image:
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return Image.fromarray(data.astronaut()).resize(size, Image.Resampling.BILINEAR)


def apply(transform: str, image: Image.Image, resolution: int) -> np.ndarray:
    return np.asarray(TRANSFORMS[transform](image, "a.png", resolution))


def halved(image: Image.Image) -> Image.Image:
    """Means of pairs of columns, then of pairs of rows, each rounded, halves up; odd lengths by Pillow's box filter."""
    if image.width % 2 or image.height % 2:
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(int)
    pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
    return Image.fromarray(((pixels[::2] + pixels[1::2] + 1) // 2).astype(np.uint8))


def dhariwal(image: Image.Image, side: int) -> np.ndarray:
    """The rule told another way: the number of halvings known beforehand, the crop by an array's slices."""
    halvings = 0
    while min(image.size) >> halvings >= 2 * side:
        halvings += 1
    for _ in range(halvings):
        image = halved(image)
    ratio = side / min(image.width, image.height)
    pixels = np.array(image.resize((round(ratio * image.width), round(ratio * image.height)), Image.Resampling.BICUBIC))
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top:, left:][:side, :side]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [32, 64])
def test_center_crop_dhariwal(size, resolution):
    image = photograph(size)
    pixels = apply("center-crop-dhariwal", image, resolution)
    assert pixels.shape == (resolution, resolution, 3)
    np.testing.assert_array_equal(pixels, dhariwal(image, resolution))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [32, 64])
def test_center_crop(size, resolution):
    """Cut out of the array, then resized: as EDM's tool does it."""
    image = photograph(size)
    pixels = np.asarray(image)
    side = min(pixels.shape[:2])
    height, width = pixels.shape[:2]
    cut = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    expected = np.asarray(Image.fromarray(cut).resize((resolution, resolution), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(apply("center-crop", image, resolution), expected)


def test_the_two_crops_differ():
    image = photograph((500, 375))
    assert (apply("center-crop", image, 64) != apply("center-crop-dhariwal", image, 64)).mean() > 0.5


def test_dhariwal_of_blocks_is_exact():
    """64x64 blocks of one colour, 2x2 each: two halvings of 128x128 to 32x32, in integers."""
    blocks = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(apply("center-crop-dhariwal", image, 32), blocks)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pad(mode):
    image = photograph((28, 27)).convert(mode)
    pixels = apply("pad", image, 32)
    np.testing.assert_array_equal(pixels[2:29, 2:30], np.asarray(image))
    assert pixels.astype(int).sum() == np.asarray(image).astype(int).sum()
    np.testing.assert_array_equal(apply("pad", image, 28)[:27], np.asarray(image))
    with pytest.raises(Misfit, match=r"'a.png' \(27x28x"):
        apply("pad", image, 27)


def test_none():
    image = photograph((32, 32))
    np.testing.assert_array_equal(apply("none", image, 32), np.asarray(image))
    with pytest.raises(Misfit, match=r"'a.png' \(32x32x3\)"):
        apply("none", image, 31)
