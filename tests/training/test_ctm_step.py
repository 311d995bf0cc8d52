"""A CTM step against the published code, and the cut backward pass against the naive one."""

import copy
import functools

import pytest
import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import karras_sigmas
from ctm_fast.losses import adaptive_weight, distance, dsm_loss
from ctm_fast.models import ARCHITECTURES, CTM, EDMDenoiser, NetworkConfig, build_network, to_published
from ctm_fast.training.ctm_stage import CTMStep, adaptive_layer
from ctm_fast.training.regions import Regions
from tests.golden import Golden, assert_agree

CPU = torch.device("cpu")


def make_step(student: CTM, target: CTM, teacher: EDMDenoiser, *, layer: str, compile: bool = False) -> CTMStep:
    device = torch.device("cuda") if compile else CPU  # as on a GPU: every region, forward and backward
    return CTMStep(
        student,
        target.requires_grad_(False),
        teacher.requires_grad_(False),
        distance=distance("l2", c=0.03),
        layer=layer,
        sigma_min=0.002,
        dsm_weight=1.0,
        regions=Regions(compile=compile, device=device),
    )


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
    step = make_step(student, target, golden.teacher("teacher"), layer=layer, compile=backend is not None)
    labels, k = golden["y"], golden.meta["heun_steps"]
    grid = torch.from_numpy(karras_sigmas(golden.meta["N"])).float()
    way = torch.stack([grid[golden["index_t"].long() + i] for i in range(k + 1)])
    t, u, s = way[0], way[-1], grid[golden["index_s"].long()]
    for ours, name in ((t, "t"), (u, "u"), (s, "s")):
        torch.testing.assert_close(ours, golden[name], rtol=1e-6, atol=0)

    x_t = golden["x0"] + t.view(-1, 1, 1, 1) * golden["eps"]
    x_u = step.solve(golden["x_t"], way, labels)
    consistency_target = step.consistency_target(x_u, u, s, labels)
    terms = step.backward(
        golden["x_t"], t, s, consistency_target, golden["x0"], golden["dsm_sigma"], golden["dsm_noise"], labels
    )
    assert_agree(x_t, golden["x_t"])
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


def naive_gradients(
    step: CTMStep, arguments: tuple[Tensor, ...], target: CTM, layer: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The published way: gradients at W first, then the weighted sum differentiated from the start."""
    x_t, t, s, consistency_target, x0, sigma, noise, labels = arguments
    student = step.student
    estimate = target.jump(student.jump(x_t, t, s, labels), s, torch.full_like(s, 0.002), labels)
    ctm = step.distance(estimate, consistency_target).mean()
    x_sigma = x0 + sigma.view(-1, 1, 1, 1) * noise
    dsm = dsm_loss(student.denoise(x_sigma, sigma, labels), x0, sigma, sigma_data=student.sigma_data).mean()
    weight = adaptive_layer(student.net, layer)
    norms = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (ctm, dsm)]
    lambda_dsm = adaptive_weight(*norms, lowest=0.0, highest=1e4)
    (ctm + lambda_dsm * dsm).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return gradients, lambda_dsm


@pytest.mark.parametrize("attention", [(), (8,)])
@pytest.mark.parametrize("layer", ["output", "block"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cut_gradients_are_the_naive_ones(arch: str, layer: str, attention: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(
        arch=arch, img_resolution=8, img_channels=1, label_dim=3, model_channels=32 if arch == "adm" else 16,
        channel_mult=(1, 2), num_blocks=1, attn_resolutions=attention, dropout=0.0,
    )  # fmt: skip
    student, target = (CTM(build_network(config, s_branch=True), 0.5) for _ in range(2))
    for parameter in [*student.parameters(), *target.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    step = make_step(student, target, EDMDenoiser(build_network(config, s_branch=False), 0.5), layer=layer)
    x_t, x0, noise, wanted = torch.randn(4, 3, 1, 8, 8).unbind()
    t, s, sigma = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([1.0, 0.002, 0.5]), torch.tensor([0.1, 2.0, 9.0])
    arguments = (x_t, t, s, wanted, x0, sigma, noise, torch.tensor([0, 2, 1]))
    expected, lambda_dsm = naive_gradients(step, arguments, target, layer)
    terms = step.backward(*arguments)
    torch.testing.assert_close(terms["lambda_dsm"], lambda_dsm, rtol=1e-5, atol=0)
    assert expected.keys() == {name for name, p in student.named_parameters() if p.grad is not None}
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].abs().max()
        # A bias before the norm of a single channel has gradient 0: what is there is rounding.
        assert (parameter.grad - expected[name]).abs().max() <= 2e-5 * scale + 1e-8, name
