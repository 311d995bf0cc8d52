"""Every kind of image file is taken exactly, converted by a rule that was asked for, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ctm_fast.data.decode import Misfit, decode
from ctm_fast.data.images import ImageFile
from tests.data.forms import encoded

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def file(content: bytes, name: str = "a.png") -> ImageFile:
    return ImageFile(name, lambda: content)


def png16(colour: int, samples: np.ndarray) -> bytes:
    """A PNG of 16 bits, which Pillow does not write: [H, W, C] big-endian. Colour type 0 grey, 2 RGB, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(form: str) -> bytes:
    images = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    return encoded(images[0], form, save_all=True, append_images=images[1:], duration=100)


def test_grey_and_rgb_as_they_are():
    for array in (RGB, RGB[..., 0]):
        np.testing.assert_array_equal(np.asarray(decode(file(encoded(Image.fromarray(array))))), array)
    lossless = encoded(Image.fromarray(RGB), "WEBP", lossless=True)
    np.testing.assert_array_equal(np.asarray(decode(file(lossless))), RGB)


def test_a_jpeg_as_pillow_decodes_it():
    content = encoded(Image.fromarray(RGB), "JPEG", quality=90)
    np.testing.assert_array_equal(np.asarray(decode(file(content))), np.asarray(Image.open(io.BytesIO(content))))


def with_alpha() -> Image.Image:
    return Image.fromarray(np.concatenate([RGB, RGB[..., :1]], 2))


ODD: dict[str, tuple[bytes, str]] = {
    "alpha": (encoded(with_alpha()), "mode RGBA in 'a.png'"),
    "grey and alpha": (encoded(Image.fromarray(RGB[..., 0]).convert("LA")), "mode LA in "),
    "a palette": (encoded(Image.fromarray(RGB).quantize(16)), "mode P in "),
    "CMYK": (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"), "mode CMYK in "),
    "single bits": (encoded(Image.fromarray(RGB[..., 0]).convert("1")), "mode 1 in "),
    "a transparent colour": (
        encoded(Image.fromarray(RGB), transparency=(1, 2, 3)),
        "mode RGB with a transparent colour in ",
    ),
}
NEVER: dict[str, tuple[bytes, str]] = {
    "grey of 16 bits": (encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 256)), "mode I;16 of 16 bits in "),
    "RGB of 16 bits": (png16(2, RGB.astype(np.uint16) * 257), "mode RGB of 16 bits in "),
    "RGBA of 16 bits": (png16(6, np.asarray(with_alpha()).astype(np.uint16)), "mode RGBA of 16 bits in "),
    "an animated PNG": (frames("PNG"), r"'a.png' \(2 frames\)"),
    "an animated WebP": (frames("WEBP"), r"\(2 frames\)"),
    "a GIF under another name": (encoded(Image.fromarray(RGB), "GIF"), "'a.png': UnidentifiedImageError"),
    "a truncated PNG": (encoded(Image.fromarray(RGB))[:-25], "'a.png': "),
    "a truncated JPEG": (encoded(Image.fromarray(RGB), "JPEG")[:-30], "'a.png': OSError: .*truncated"),
    "nothing": (b"", "'a.png': UnidentifiedImageError"),
}


def test_pillow_would_drop_eight_bits_in_silence():
    image = Image.open(io.BytesIO(NEVER["RGB of 16 bits"][0]))
    assert image.mode == "RGB"
    assert np.asarray(image).dtype == np.uint8


@pytest.mark.parametrize("case", ODD)
def test_odd_modes_only_where_asked_for(case):
    content, message = ODD[case]
    with pytest.raises(Misfit, match=message):
        decode(file(content))
    original = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(np.asarray(decode(file(content), "rgb")), np.asarray(original.convert("RGB")))
    grey = original.convert("RGB").convert("L")
    np.testing.assert_array_equal(np.asarray(decode(file(content), "grey")), np.asarray(grey))


@pytest.mark.parametrize("case", NEVER)
@pytest.mark.parametrize("conversion", [None, "rgb", "grey"])
def test_what_is_never_taken(case, conversion):
    content, message = NEVER[case]
    with pytest.raises(Misfit, match=message):
        decode(file(content), conversion)


def test_conversions_are_what_they_say():
    opaque = decode(file(ODD["alpha"][0]), "rgb")
    np.testing.assert_array_equal(np.asarray(opaque), RGB)  # alpha is dropped
    grey = encoded(Image.fromarray(RGB[..., 0]))
    np.testing.assert_array_equal(np.asarray(decode(file(grey), "rgb")), RGB[..., :1].repeat(3, 2))
    np.testing.assert_array_equal(np.asarray(decode(file(grey), "grey")), RGB[..., 0])
    luma = RGB.astype(int) @ np.array([19595, 38470, 7471])  # ITU-R 601-2 in 16 bits
    np.testing.assert_array_equal(np.asarray(decode(file(encoded(Image.fromarray(RGB))), "grey")), (luma + 2**15) >> 16)


def test_the_size_is_looked_at_before_the_pixels():
    """A truncated image of another size: what is told is the size."""
    content = encoded(Image.fromarray(np.zeros((3000, 4000), np.uint8)))[:-20]
    with pytest.raises(Misfit, match=r"\(3000x4000x1\)"):
        decode(file(content), resolution=8)


def test_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(file(content))), RGB)
