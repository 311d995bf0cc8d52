"""Layers: resampling, the cut of a block, and a student that starts as its teacher."""

import pytest
import torch

from ctm_fast.models import CTM, EDMDenoiser, build_network
from ctm_fast.nn import BILINEAR, BlockStyle, Conv2d, DownConv2d, Resampler, UNetBlock
from ctm_fast.training.presets import preset


@pytest.mark.parametrize("resample", ["up", "down"])
def test_resampling_is_the_box_filter(resample: str) -> None:
    conv = Conv2d(2, 2, 1, resample=resample)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    x = torch.randn(1, 2, 4, 4)
    if resample == "down":
        expected = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    else:
        expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resample", ["up", "down"])
def test_resampling_by_four_taps_is_bilinear(resample: str, dtype: torch.dtype) -> None:
    """Tap by tap in each direction, with zeros beyond the border; it keeps channels_last."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    expected = x
    for axis in (2, 3):
        if resample == "up":  # 3/4 of the pixel itself, 1/4 of the one on the new pixel's side
            before, after = (_shifted(expected, axis, by) for by in (1, -1))
            expected = torch.stack([0.75 * expected + 0.25 * before, 0.75 * expected + 0.25 * after], axis + 1)
            expected = expected.flatten(axis, axis + 1)
        else:
            even, odd = (expected.unfold(axis, 2, 2).select(-1, i) for i in (0, 1))
            expected = (_shifted(odd, axis, 1) + 3 * even + 3 * odd + _shifted(even, axis, -1)) / 8
    channels_last = x.to(dtype).contiguous(memory_format=torch.channels_last)
    actual = Resampler(resample, BILINEAR)(channels_last)  # type: ignore[arg-type]
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def _shifted(x: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """``x`` moved by one pixel along ``axis``, zero where nothing comes from."""
    zero = torch.zeros_like(x.narrow(axis, 0, 1))
    size = x.shape[axis]
    return torch.cat([zero, x.narrow(axis, 0, size - 1)] if by > 0 else [x.narrow(axis, 1, size - 1), zero], axis)


def test_the_fused_down_convolution_differs_at_the_border_alone() -> None:
    fused = DownConv2d(3, 5, taps=BILINEAR)
    conv = Conv2d(3, 5, 3)
    conv.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 12, 12)
    apart = Resampler("down", BILINEAR)(conv(x))
    difference = (fused(x) - apart).abs().amax((0, 1))
    assert difference.shape == (6, 6)
    assert difference[1:-1, 1:-1].max() < 1e-5
    assert min(difference[0].min(), difference[-1].min(), difference[:, 0].min(), difference[:, -1].min()) > 1e-3


@pytest.mark.parametrize("style", [BlockStyle(), BlockStyle(modulate=True, residual_scale=1.0)])
def test_a_block_is_its_two_halves(style: BlockStyle) -> None:
    block = UNetBlock(8, 16, 12, style=style, s_branch=True, attention=True, heads=2).eval()
    x, emb, emb_s = torch.randn(2, 8, 4, 4), torch.randn(2, 12), torch.randn(2, 12)
    torch.testing.assert_close(block(x, emb, emb_s), block.second(*block.first(x, emb, emb_s)))


def test_a_jump_to_the_same_level_is_the_identity() -> None:
    model = CTM(build_network(preset("digits").network, s_branch=True), 0.75)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([80.0, 1.0, 0.002])
    torch.testing.assert_close(model.jump(x, t, t, torch.tensor([0, 1, 2])), x, rtol=0, atol=0)


def test_conditioning_is_checked() -> None:
    conditional = build_network(preset("digits").network, s_branch=True)
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match="labels: expected class indices"):
        conditional(x, t, t)
    with pytest.raises(ValueError, match="s: expected a noise level"):
        conditional(x, t, None, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels: expected \[2\] or \[2, 10\], got \[3, 10\]"):
        conditional(x, t, t, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="net: expected a network without an s-branch"):
        EDMDenoiser(conditional)
