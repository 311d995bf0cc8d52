"""Data sets: the forms in which images are stored, read whole as uint8 or repacked, and the order of training."""

from ctm_fast.data.checks import MAX_CLASSES
from ctm_fast.data.dataset import ImageDataset, load_dataset
from ctm_fast.data.decode import CONVERSIONS
from ctm_fast.data.edm_zip import write_edm_zip
from ctm_fast.data.order import batch_indices, epoch_order
from ctm_fast.data.repack import Repacked, repack
from ctm_fast.data.transform import TRANSFORMS

__all__ = [
    "CONVERSIONS",
    "MAX_CLASSES",
    "TRANSFORMS",
    "ImageDataset",
    "Repacked",
    "batch_indices",
    "epoch_order",
    "load_dataset",
    "repack",
    "write_edm_zip",
]
