"""A CTM step against the published code, and the cut backward pass against the naive one."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import karras_sigmas
from ctm_fast.losses import distance
from ctm_fast.models import CTM, EDMDenoiser, to_published
from ctm_fast.training.config import CTMConfig
from ctm_fast.training.ctm_step import CTMStep, Piece
from ctm_fast.training.regions import Regions
from tests.golden import Golden, assert_agree

CPU = torch.device("cpu")


def make_step(student: CTM, target: CTM, teacher: EDMDenoiser, *, compile: bool = False, **settings: Any) -> CTMStep:
    device = torch.device("cuda") if compile else CPU  # as on a GPU: every region, forward and backward
    return CTMStep(
        student,
        target.requires_grad_(False),
        teacher.requires_grad_(False),
        settings=CTMConfig(**settings),
        distance=distance("l2", c=0.03),
        sigma_min=0.002,
        regions=Regions(compile=compile, device=device),
    )


def make_piece(
    x0: Tensor, noise: Tensor, way: Tensor, s: Tensor, sigma: Tensor, dsm_noise: Tensor, labels: Tensor | None
) -> Piece:
    return Piece(
        x0=x0, noise=noise, way=way, s=s, stays_u=(s == way[-1]).numpy(), stays_end=(s <= 0.00201).numpy(),
        sigma=sigma, dsm_noise=dsm_noise, labels=labels, seeds=torch.arange(len(x0)), step=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer", "backend"),
    [
        ("cifar/train_step.npz", "output", None),
        ("cifar/train_step.npz", "output", "aot_eager"),
        pytest.param("cifar/train_step.npz", "output", "inductor", marks=pytest.mark.long),
        ("imagenet/train_step.npz", "block", None),
        pytest.param("imagenet/train_step.npz", "block", "aot_eager", marks=pytest.mark.long),
        pytest.param("imagenet/train_step.npz", "block", "inductor", marks=pytest.mark.long),
    ],
)
def test_step_of_the_published_code(
    name: str, layer: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eagerly, and with every region compiled: differentiated by AOTAutograd, and by Inductor's code (minutes)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend or "inductor"))
    golden = Golden(name)
    student, target = (golden.student(prefix).train() for prefix in ("student", "ema"))
    step = make_step(student, target, golden.teacher("teacher"), adaptive_layer=layer, compile=backend is not None)
    labels, k = golden["y"], golden.meta["heun_steps"]
    grid = torch.from_numpy(karras_sigmas(golden.meta["N"])).float()
    way = torch.stack([grid[golden["index_t"].long() + i] for i in range(k + 1)])
    t, u, s = way[0], way[-1], grid[golden["index_s"].long()]
    for ours, name in ((t, "t"), (u, "u"), (s, "s")):
        torch.testing.assert_close(ours, golden[name], rtol=1e-6, atol=0)

    piece = make_piece(golden["x0"], golden["eps"], way, s, golden["dsm_sigma"], golden["dsm_noise"], labels)
    x_u = step.solve(piece.x_t, way, labels)
    consistency_target = step.consistency_target(x_u, piece)
    terms = step.backward([(piece, consistency_target)])
    assert_agree(piece.x_t, golden["x_t"])
    assert_agree(x_u, golden["x_u"], golden.tolerance)
    assert_agree(consistency_target, golden["target"], golden.tolerance)
    assert_agree(terms["estimate"], golden["estimate"], golden.tolerance)
    assert_agree(terms["dsm_loss"], golden["dsm_loss"], golden.tolerance)
    # Differences of nearly equal images, squared: the images' 1e-5 is amplified.
    assert_agree(terms["ctm_loss"], golden["ctm_loss"], 1e-4)
    assert_agree(terms["lambda_dsm"], golden["lambda_dsm"], 1e-4)
    assert_agree(terms["loss"], golden["total"], 1e-4)

    gradients = copy.deepcopy(student)
    for ours, parameter in zip(gradients.parameters(), student.parameters(), strict=True):
        assert parameter.grad is not None
        ours.data = parameter.grad
    published = to_published(gradients)
    norms = {name: published[name].norm().item() for name in published if not name.endswith("resample_filter")}
    expected = dict(zip(golden.arrays["grad_names"].tolist(), golden.arrays["grad_norms"].tolist(), strict=True))
    assert norms.keys() == expected.keys()
    for name, value in expected.items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-8), name  # some are exactly 0
