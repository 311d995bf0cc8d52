"""Layers: resampling, the cut of a block, and a student that starts as its teacher."""

import pytest
import torch

from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network
from ctm_fast.nn import Conv2d, UNetBlock
from ctm_fast.training.config import RunConfig
from ctm_fast.training.ctm_stage import student_of
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


def test_a_block_is_its_two_halves() -> None:
    block = UNetBlock(8, 16, 12, s_branch=True, attention=True, heads=2).eval()
    x, emb, emb_s = torch.randn(2, 8, 4, 4), torch.randn(2, 12), torch.randn(2, 12)
    torch.testing.assert_close(block(x, emb, emb_s), block.second(*block.first(x, emb, emb_s)))


def test_a_student_starts_as_its_teacher_at_any_s() -> None:
    config: RunConfig = preset("digits")
    torch.manual_seed(0)
    teacher = EDMDenoiser(build_network(config.network, s_branch=False), config.sigma_data).eval()
    for parameter in teacher.parameters():  # none left at its zero
        torch.nn.init.normal_(parameter, std=0.1)
    student = student_of(teacher, config).eval()
    x = torch.randn(4, 1, 8, 8)
    t = torch.tensor([80.0, 3.0, 0.5, 0.002])
    labels = torch.tensor([0, 1, 2, 9])
    with torch.no_grad():
        for s in (t, t * 0.3, torch.full_like(t, 0.002)):
            torch.testing.assert_close(student.inner(x, t, s, labels), teacher.denoise(x, t, labels), rtol=0, atol=0)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "affine_s" in name:
                    parameter.normal_()
        assert (student.inner(x, t, t * 0.3, labels) - teacher.denoise(x, t, labels)).abs().max() > 1e-2


def test_a_jump_to_the_same_level_is_the_identity() -> None:
    model = CTM(build_network(preset("digits").network, s_branch=True), 0.75)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([80.0, 1.0, 0.002])
    torch.testing.assert_close(model.jump(x, t, t, torch.tensor([0, 1, 2])), x, rtol=0, atol=0)


def test_published_sizes() -> None:
    """Parameters and floating-point operations of the CIFAR-10 network, as published."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in build_network(NetworkConfig(label_dim=labels), s_branch=s).parameters())
            for labels, s in ((0, True), (10, True), (0, False), (10, False))
        ]
    assert counts == [60_395_267, 60_396_675, 55_732_739, 55_734_147]


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
