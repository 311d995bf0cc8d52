"""One image file to 8-bit grey or RGB, by rules that change nothing in silence.

Grey and RGB of 8 bits (or fewer, as PNG scales them) are taken as they are. Palettes, alpha, transparent colours, CMYK
and single bits are refused unless the caller converts them, as :func:`convert` says; 16 bits, animations and files that
do not decode are refused always. Colour profiles and EXIF orientations are not applied, as in all published data sets.
"""

import io

from PIL import Image

from ctm_fast.data.checks import size
from ctm_fast.data.images import ImageFile
from ctm_fast.errors import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CONVERSIONS = ("rgb", "grey")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("L", "RGB")
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # of a PNG: the byte that says how many bits a sample has

SIZE, LARGEST, MODE, STILL, READABLE = "size", "largest", "mode", "still", "readable"
"""What an image may fail to be, see :class:`Misfit`."""


class Misfit(Exception):  # noqa: N818  # told with the others, not raised at the user
    """An image that cannot be taken: which of these expectations it fails, and its name with what it is."""

    def __init__(self, kind: str, got: str) -> None:
        super().__init__(got)
        self.kind = kind
        self.got = got


def decode(file: ImageFile, conversion: str | None = None, resolution: int | None = None) -> Image.Image:
    """The image in mode L or RGB.

    Args:
        file: a PNG, JPEG or WebP, whatever its name.
        conversion: rgb or grey: what all images are converted to. None: none is.
        resolution: the height and width it must have, checked before it is decoded; None takes any.

    Raises Misfit.
    """
    try:
        content = file.read()
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if resolution is not None and image.size != (resolution, resolution):
                shape = (image.height, image.width, len(image.getbands()))
                raise Misfit(SIZE, f"{file.name!r} ({size(shape)})")
            frames = getattr(image, "n_frames", 1)
            if frames != 1:
                raise Misfit(STILL, f"{file.name!r} ({frames} frames)")
            deep = content.startswith(_PNG) and content[_PNG_DEPTH] == 16
            transparent = "transparency" in image.info
            plain = image.mode in _MODES and not transparent
            if deep or not (plain or (conversion is not None and image.mode in _CONVERTIBLE)):
                more = " of 16 bits" if deep else " with a transparent colour" if transparent else ""
                raise Misfit(MODE, f"mode {image.mode}{more} in {file.name!r}")
            image.load()
            return image.copy() if conversion is None else convert(image, conversion)
    except Misfit:
        raise
    except Exception as error:  # on broken bytes they raise a dozen types
        raise Misfit(READABLE, f"{file.name!r}: {reason(error)}") from error


def convert(image: Image.Image, conversion: str) -> Image.Image:
    """``image`` in RGB, or in grey (ITU-R 601-2).

    Grey is repeated, a palette looked up, alpha and transparent colours dropped as if all were opaque, CMYK taken as
    (1 - C)(1 - K), ...: Pillow's rules, by which the published ImageNet networks saw the odd ones among their images.
    """
    rgb = image.convert("RGB")
    return rgb if conversion == "rgb" else rgb.convert("L")
