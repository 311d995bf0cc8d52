"""The class of an image as a function of its seed, whatever other seeds it is made with."""

from collections.abc import Sequence
from typing import Literal

import torch

from ctm_fast.ops import Stream, philox_words

LabelRule = Sequence[int] | Literal["random"] | None
"""Classes to be used in turn, "random", or None: all classes in turn."""


def labels_of_seeds(seeds: Sequence[int], num_classes: int, rule: LabelRule = None) -> list[int] | None:
    """The class of each seed; None where there are no classes.

        in turn     rule[seed mod len(rule)]
        "random"    floor(w K / 2^32)    w: the first word of the seed's stream for classes; uniform to K / 2^32

    Args:
        seeds: 0 to 2^63 - 1.
        num_classes: K.
    """
    if num_classes == 0:
        return None
    if rule == "random":
        words = philox_words(torch.tensor(seeds, dtype=torch.int64), 0, (1,), stream=Stream.LABEL)
        return ((words[:, 0] * num_classes) >> 32).tolist()
    classes = range(num_classes) if rule is None else rule
    return [classes[seed % len(classes)] for seed in seeds]
