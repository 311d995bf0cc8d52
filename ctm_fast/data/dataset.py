"""The images to train on, read whole into memory as uint8."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctm_fast.data.checks import check_labels, check_pixels
from ctm_fast.data.decode_all import decode_all
from ctm_fast.data.images import Arrays
from ctm_fast.data.sources import WORDS, open_source


@dataclass(frozen=True)
class ImageDataset:
    """Images [N, C, H, W] uint8 and, for a conditional model, labels [N] int64 in 0..num_classes-1.

    Without labels ``labels`` is None and ``num_classes`` 0. ``name`` is the data set's word, or its file's stem.
    """

    name: str
    images: Tensor
    labels: Tensor | None
    num_classes: int


def load_dataset(
    source: str | Path, *, resolution: int, channels: int | None = None, labels: bool, split: str = "train"
) -> ImageDataset:
    """Read a data set, whichever of these ``source`` is:

    ``digits``
        1,797 handwritten digits 8x8 in grey, from scikit-learn; they come with the package.
    ``fashion-mnist``
        Debian's package dataset-fashion-mnist: 60,000 articles of clothing 28x28 in grey, 10,000 in the test split.
    a directory of IDX files
        ``train-*-ubyte.gz`` of MNIST and its successors, ``t10k-*-ubyte.gz`` being the test split. Images of 28x28 are
        also given at 32 (two zeros added on each side) and at 16 (that, then the mean of 2x2 pixels, halves rounded
        to even).
    a directory of images
        with the ``dataset.json`` of EDM, or with a folder for each class, whose label is its place among their names
        in order, or among their numbers where all are numbers.
    ``FILE.npz``
        ``arr_0`` uint8 [N, H, W, C], ``arr_1`` integer [N]; the form of samples and reference batches.
    ``FILE.zip``
        the form of StyleGAN and EDM: image files, in the order of their names, ``dataset.json``
        ``{"labels": [[name, label], ...]}``, and nothing else.
    ``cifar-10-python.tar.gz``, ``cifar-10-binary.tar.gz``
        as published, with the test split; the pickles in the first are read as data.
    ``FILE.tar``
        webdataset's ``KEY.png`` and ``KEY.cls``, not compressed; or a directory of ``train-*.tar``, ``test-*.tar``.
    ``FILE.parquet``
        of the Hugging Face Hub, an image column and ``label``; or a directory of ``train-*.parquet``,
        ``test-*.parquet``. Needs the extra ``data``.

    Image files are PNG, JPEG or WebP, 8-bit grey or RGB, all alike; they are decoded by as many threads as torch uses.
    Nothing is resized but for the rule above: that is what ``python -m ctm_fast.dataset`` is for.

    Args:
        source: a word from above or a path; the word wins over a path of that name (write ``./digits``).
        resolution: the height and width that the images must have.
        channels: 1 or 3; None takes either.
        labels: whether to read the labels, which then must be there for every image.
        split: train or, where the source has one, test.

    Raises:
        DataError: one line that says what was expected and what is there instead; of image files that cannot be taken
            it counts all and names the first few.
    """
    with open_source(source, resolution=resolution, labels=labels, split=split) as found:
        path, classes = found.path, found.labels
        if isinstance(found, Arrays):
            check_pixels(path, found.pixels, resolution, channels)
        if classes is not None:
            check_labels(path, classes, found.count)
        if isinstance(found, Arrays):
            pixels = np.ascontiguousarray(found.pixels.transpose(0, 3, 1, 2))
        else:
            pixels = decode_all(found, resolution, channels)
    name = str(source) if source in WORDS else Path(path.name.removesuffix(".gz")).stem
    images = torch.from_numpy(pixels)
    if classes is None:
        return ImageDataset(name, images, None, 0)
    return ImageDataset(name, images, torch.from_numpy(classes.astype(np.int64)), int(classes.max()) + 1)
