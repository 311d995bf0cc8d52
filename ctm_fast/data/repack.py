"""Any data set into an EDM zip of one size, an image at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from PIL import Image

from ctm_fast.data.checks import check_images, check_labels, size
from ctm_fast.data.decode import CONVERSIONS, MODE, SIZE, Misfit, convert, decode
from ctm_fast.data.edm_zip import picture, png, write_pngs
from ctm_fast.data.images import Arrays, ImageFiles, Pixels
from ctm_fast.data.misfits import Misfits
from ctm_fast.data.parallel import in_order
from ctm_fast.data.sources import open_source
from ctm_fast.data.transform import TRANSFORMS
from ctm_fast.errors import ConfigError
from ctm_fast.files import atomic_write

_MOST_PIXELS = 1024  # of a side: no network here is made for more
_REMEDIES = {
    SIZE: "a transform makes images of one size, a conversion to rgb or grey of one kind",
    MODE: "a conversion to rgb or grey takes all but 16 bits",
}

Picture = tuple[str, Callable[[], Image.Image]]
"""The name of an image, and what gives it in mode L or RGB or raises Misfit."""


@dataclass(frozen=True)
class Repacked:
    """How many images and classes were written; ``num_classes`` is 0 without labels."""

    count: int
    num_classes: int


def repack(
    source: str | Path,
    destination: str | Path,
    *,
    resolution: int,
    transform: str = "none",
    labels: bool = True,
    max_images: int | None = None,
    conversion: str | None = None,
    split: str = "train",
) -> Repacked:
    """Write the images of ``source`` to the zip ``destination``, in the order in which ``load_dataset`` reads them.

    Of image files only a few are in memory at a time (arrays, such as npz and CIFAR-10, are read whole), of the zip its
    table of contents. Its bytes depend on the source, the arguments and the versions of Pillow and zlib alone.

    Args:
        source: any form of :func:`ctm_fast.data.load_dataset`; its images may have any sizes.
        destination: the zip; it appears whole or not at all.
        resolution: height and width of what is written.
        transform: a name of :data:`ctm_fast.data.TRANSFORMS`; none: the images must have that size.
        labels: whether labels are written, which then must be there for all images.
        max_images: only the first so many; None: all.
        conversion: rgb or grey, see :func:`ctm_fast.data.decode.convert`; None: all must be 8-bit grey, or all RGB.
        split: train or, where the source has one, test.

    Raises ConfigError for an argument that is none of these, DataError that counts all images that cannot be taken.
    """
    _check_arguments(resolution, transform, max_images, conversion)
    fit = resolution if transform == "none" else None
    with open_source(source, resolution=fit, labels=labels, split=split) as found:
        if isinstance(found, Arrays):
            check_images(found.path, found.pixels)
        count = found.count if max_images is None else min(max_images, found.count)
        classes = None
        if found.labels is not None:
            check_labels(found.path, found.labels, found.count)
            classes = found.labels[:count].tolist()
        pictures = islice(_pictures(found, conversion), count)
        pngs = _pngs(pictures, Misfits(found.path, count, _REMEDIES), resolution, transform)
        atomic_write(destination, lambda file: write_pngs(file, pngs, classes))
    return Repacked(count, 0 if classes is None else max(classes) + 1)


def _check_arguments(resolution: int, transform: str, max_images: int | None, conversion: str | None) -> None:
    if not 1 <= resolution <= _MOST_PIXELS:
        raise ConfigError(f"resolution: expected 1 to {_MOST_PIXELS}, got {resolution}")
    if transform not in TRANSFORMS:
        raise ConfigError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if max_images is not None and max_images < 1:
        raise ConfigError(f"max_images: expected at least 1, got {max_images}")
    if conversion is not None and conversion not in CONVERSIONS:
        raise ConfigError(f"conversion: expected one of {', '.join(CONVERSIONS)}, got {conversion!r}")


def _pictures(found: Arrays | ImageFiles, conversion: str | None) -> Iterator[Picture]:
    if isinstance(found, ImageFiles):
        for file in found.files:
            yield file.name, partial(decode, file, conversion)
    else:
        for i, pixels in enumerate(found.pixels):
            yield f"image {i}", partial(_picture, pixels, conversion)


def _picture(pixels: Pixels, conversion: str | None) -> Image.Image:
    image = picture(pixels)
    return image if conversion is None else convert(image, conversion)


def _pngs(pictures: Iterator[Picture], misfits: Misfits, resolution: int, transform: str) -> Iterator[bytes]:
    """Each picture changed and encoded; after the first that cannot be taken, the others are only looked at."""

    def encoded(item: Picture) -> tuple[str, int, bytes] | Misfit:
        name, opened = item
        try:
            image = TRANSFORMS[transform](opened(), name, resolution)
        except Misfit as misfit:
            return misfit
        return name, len(image.getbands()), png(image)

    channels = None
    for result in in_order(encoded, pictures, count=misfits.count, what="writing images"):
        if not isinstance(result, Misfit):
            name, bands, content = result
            channels = channels or bands
            if bands == channels:
                misfits.see(None)
                if not misfits:
                    yield content
                continue
            result = Misfit(SIZE, f"{name!r} ({size((resolution, resolution, bands))})")
        misfits.see(result)
        if misfits.full:
            break
    if misfits:
        misfits.refuse(resolution, channels)
