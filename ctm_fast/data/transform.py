"""How an image of any size becomes a square one: the rules of the published data sets, pixel for pixel."""

from collections.abc import Callable

from PIL import Image
from PIL.Image import Resampling

from ctm_fast.data.checks import size
from ctm_fast.data.decode import LARGEST, SIZE, Misfit

Transform = Callable[[Image.Image, str, int], Image.Image]
"""Of an image, its name and the resolution."""


def unchanged(image: Image.Image, name: str, resolution: int) -> Image.Image:
    """``image``, which is resolution x resolution. Raises Misfit if it is not."""
    if image.size != (resolution, resolution):
        raise Misfit(SIZE, _shown(image, name))
    return image


def pad(image: Image.Image, name: str, resolution: int) -> Image.Image:
    """Black all around, as much on each side; an odd row or column below or on the right. Raises Misfit if larger."""
    if max(image.size) > resolution:
        raise Misfit(LARGEST, _shown(image, name))
    square = Image.new(image.mode, (resolution, resolution))
    square.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
    return square


def center_crop(image: Image.Image, name: str, resolution: int) -> Image.Image:
    """The middle square, resized by Lanczos' filter: EDM's ``center-crop`` (arXiv 2206.00364, its dataset_tool).

    A smaller image is enlarged.
    """
    return _middle(image, min(image.size)).resize((resolution, resolution), Resampling.LANCZOS)


def center_crop_dhariwal(image: Image.Image, name: str, resolution: int) -> Image.Image:
    """Halved while the shorter side has twice the resolution or more, that side fitted, the middle cut out.

    Halves by Pillow's box filter, fits by its bicubic one (arXiv 2105.05233, guided-diffusion's ImageNet; that of
    the published CTM, consistency models and EDM). A smaller image is enlarged.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = resolution / min(image.size)
    fitted = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    return _middle(fitted, resolution)


TRANSFORMS: dict[str, Transform] = {
    "none": unchanged,
    "pad": pad,
    "center-crop": center_crop,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _shown(image: Image.Image, name: str) -> str:
    return f"{name!r} ({size((image.height, image.width, len(image.getbands())))})"
