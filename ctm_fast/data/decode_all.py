"""All image files of a set into one array."""

import numpy as np

from ctm_fast.data.checks import size
from ctm_fast.data.decode import MODE, SIZE, Misfit, decode
from ctm_fast.data.images import ImageFile, ImageFiles, Pixels
from ctm_fast.data.misfits import Misfits
from ctm_fast.data.parallel import in_order
from ctm_fast.errors import DataError

_REMEDIES = dict.fromkeys((SIZE, MODE), "`python -m ctm_fast.dataset` resizes and converts")


def decode_all(source: ImageFiles, resolution: int, channels: int | None) -> Pixels:
    """All images as [count, C, resolution, resolution] uint8, the same with any number of threads.

    C is ``channels``, or else that of the first image that can be taken. Raises DataError, which counts all that
    cannot. Beside the array there are never more than a few blocks of images in memory.
    """

    def decoded(file: ImageFile) -> tuple[str, Pixels | Misfit]:
        try:
            image = np.asarray(decode(file, resolution=resolution))
        except Misfit as misfit:
            return file.name, misfit
        return file.name, image if image.ndim == 3 else image[..., None]

    pixels = None
    misfits = Misfits(source.path, source.count, _REMEDIES)
    for i, (name, image) in enumerate(in_order(decoded, source.files, count=source.count, what="reading images")):
        if not isinstance(image, Misfit):
            channels = channels or image.shape[2]
            if image.shape[2] != channels:
                image = Misfit(SIZE, f"{name!r} ({size(image.shape)})")
        if isinstance(image, Misfit):
            misfits.see(image)
            if misfits.full:
                break
            continue
        misfits.see(None)
        if pixels is None:
            pixels = _room(source, image.shape)
        pixels[i] = image.transpose(2, 0, 1)
    if misfits or pixels is None:
        misfits.refuse(resolution, channels)
    return pixels


def _room(source: ImageFiles, shape: tuple[int, ...]) -> Pixels:
    """For all images of ``shape`` [H, W, C], channels first; DataError where there is none."""
    height, width, channels = shape
    try:
        return np.empty((source.count, channels, height, width), np.uint8)
    except (MemoryError, ValueError) as error:
        gib = source.count * channels * height * width / 2**30
        what = f"{source.count} images of {size(shape)}, {gib:.0f} GiB"
        raise DataError(f"data: {source.path}: expected to fit into memory, got {what}") from error
