"""Images in uint8 and in float, to and fro."""

import pytest
import torch

from ctm_fast.diffusion.images import to_float, to_uint8


def test_uint8_to_float_and_back_is_exact():
    values = torch.arange(256, dtype=torch.uint8)
    images = to_float(values)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_uint8(images), values)


def test_to_uint8_rounds_and_clamps():
    grey_levels = torch.tensor([-3.0, 0.4, 0.6, 99.4, 99.6, 300.0])
    assert to_uint8(grey_levels / 127.5 - 1).tolist() == [0, 0, 1, 99, 100, 255]


def test_to_float_and_to_uint8_refuse_each_others_input():
    with pytest.raises(TypeError, match=r"images: expected uint8, got torch.float32"):
        to_float(torch.zeros(2))
    with pytest.raises(TypeError, match=r"images: expected a floating-point dtype, got torch.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))
