"""What holds for each architecture, built from a description, without published numbers."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ctm_fast.models import (
    ARCHITECTURES,
    CTM,
    NETWORKS,
    EDMDenoiser,
    NetworkConfig,
    build_network,
    network_preset,
    student_from_teacher,
)
from ctm_fast.nn import UNetBlock
from ctm_fast.ops import use_reference
from ctm_fast.ops._library import BACKENDS, Backend, unavailable, use_backend
from tests.golden import assert_agree
from tests.models.small import SMALL, random_network

ARCHS = list(SMALL)


def inputs(batch: int, classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, s, labels."""
    t = torch.logspace(1.5, -1, batch)
    return torch.randn(batch, 3, 8, 8), t, 0.3 * t, torch.arange(batch) % classes


def test_every_architecture_is_tried() -> None:
    assert set(ARCHS) == set(ARCHITECTURES) == {config.arch for config in NETWORKS.values()}


def test_build_network_takes_a_description_or_its_fields() -> None:
    config = SMALL["adm"]
    assert build_network(config, s_branch=True).config == config
    assert build_network(**vars(config), s_branch=False).config == config
    assert build_network(config, label_dim=7, s_branch=False).config == replace(config, label_dim=7)
    with torch.device("meta"):
        assert build_network(s_branch=False).config == NetworkConfig()
    with pytest.raises(TypeError, match="depth"):
        build_network(depth=3, s_branch=False)
    with pytest.raises(ValueError, match=r"arch: expected one of ddpmpp, ncsnpp, adm, dhariwal, got 'dit'"):
        build_network(arch="dit", s_branch=False)
    with pytest.raises(ValueError, match="img_resolution: expected a multiple of 2 for 2 levels, got 7"):
        build_network(config, img_resolution=7, s_branch=False)
    for wrong, message in {
        "num_blocks": "num_blocks: expected an integer from 1 on, got -1",
        "head_channels": "head_channels: expected an integer from 0 on, got -1",
        "label_dropout": "label_dropout: expected 0 <= label_dropout < 1, got -1",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_network(config, **{wrong: -1}, s_branch=False)
    with pytest.raises(ValueError, match="head_channels: expected a divisor of 64 channels, got 24"):
        build_network(config, head_channels=24, s_branch=False)
    with pytest.raises(ValueError, match=r"unknown .cifar10-ddpm.; did you mean cifar10-ddpmpp"):
        network_preset("cifar10-ddpm")


@pytest.mark.parametrize("arch", ARCHS)
def test_any_size(arch: str) -> None:
    """Resolution, channels, widths and levels other than the published ones; and no labels."""
    net = build_network(
        arch=arch, img_resolution=12, img_channels=1, model_channels=32, channel_mult=(2, 1, 3), num_blocks=2,
        attn_resolutions=(12, 3), head_channels=32, s_branch=True,
    ).eval()  # fmt: skip
    x, t = torch.randn(2, 1, 12, 12), torch.tensor([5.0, 0.1])
    assert net(x, t, t / 2).shape == x.shape
    assert EDMDenoiser(random_network(replace(net.config), s_branch=False)).denoise(x, t).shape == x.shape


@pytest.mark.parametrize("arch", ARCHS)
def test_images_of_a_batch_do_not_meet(arch: str) -> None:
    model = CTM(random_network(SMALL[arch], s_branch=True))
    x, t, s, labels = inputs(4)
    with torch.no_grad():
        whole = model.jump(x, t, s, labels)
        parts = [model.jump(x[i : i + 1], t[i : i + 1], s[i : i + 1], labels[i : i + 1]) for i in range(4)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
        for index in range(4):  # each input is heard
            for changed in (1, 2, 3):
                others = [x, t, s, labels]
                others[changed] = others[changed].clone()
                others[changed][index] = {1: 2.0, 2: 0.01, 3: 4 if labels[index] != 4 else 0}[changed]
                difference = (model.raw(*others) - model.raw(x, t, s, labels)).abs().amax((1, 2, 3))
                assert [(value > 1e-4).item() for value in difference] == [i == index for i in range(4)]


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_is_tail_of_body_and_the_tail_owns_its_parameters(arch: str) -> None:
    net = random_network(SMALL[arch], s_branch=True)
    x, t, s, labels = inputs(2)
    h, skip = net.body(x, t, s, labels)
    F_x = net.tail(h, skip)
    assert torch.equal(F_x, net(x, t, s, labels))
    assert net.last_block is list(net.dec.values())[-1]
    tail = net.tail_parameters()
    for weight in (net.out_conv.weight, net.last_block.conv1.weight):  # where adaptive weights are taken
        assert any(weight is parameter for parameter in tail)
    used = torch.autograd.grad(F_x.sum(), list(net.parameters()), allow_unused=True)
    at_cut = torch.autograd.grad(net.tail(h.detach(), skip.detach()).sum(), list(net.parameters()), allow_unused=True)
    assert all(grad is not None for grad in used)
    for parameter, grad in zip(net.parameters(), at_cut, strict=True):
        assert (grad is not None) == any(parameter is other for other in tail)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_student_starts_as_its_teacher_at_any_s(arch: str) -> None:
    teacher = EDMDenoiser(random_network(replace(SMALL[arch], augment_dim=9), s_branch=False), 0.7)
    student = student_from_teacher(teacher).eval()
    assert student.sigma_data == 0.7
    assert student.net.config == SMALL[arch]
    x, t, _, labels = inputs(4)
    with torch.no_grad():
        for s in (t, t * 0.3, torch.full_like(t, 0.002)):
            assert torch.equal(student.inner(x, t, s, labels), teacher.denoise(x, t, labels))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_student_that_starts_as_published(arch: str) -> None:
    """Every ``affine_s`` is drawn as a layer of its family is, and alone differs from the other start."""
    teacher = EDMDenoiser(random_network(SMALL[arch], s_branch=False))
    torch.manual_seed(0)
    zero = student_from_teacher(teacher).net
    torch.manual_seed(0)
    published = student_from_teacher(teacher, s_init="published").net
    for (name, tensor), other in zip(zero.state_dict().items(), published.state_dict().values(), strict=True):
        assert torch.equal(tensor, other) == ("affine_s" not in name or (name.endswith("bias") and "pp" in arch)), name
    blocks = [module for module in published.modules() if isinstance(module, UNetBlock)]
    for block in blocks:
        assert block.affine_s is not None
        outputs, fan_in = block.affine_s.weight.shape
        bound = (6 / (fan_in + outputs)) ** 0.5 if "pp" in arch else fan_in**-0.5
        assert 0.98 * bound < block.affine_s.weight.abs().max() <= bound
    x, t, s, labels = inputs(2)
    assert (published(x, t, s, labels) - zero(x, t, s, labels)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="s_init: expected zero or published, got 'random'"):
        student_from_teacher(teacher, s_init="random")


def test_initial_weights() -> None:
    """Xavier for DDPM++ and NCSN++, +-1 / sqrt(fan in) for ADM; branches start at (almost) nothing."""
    for arch in ARCHS:
        net = build_network(SMALL[arch], s_branch=True)
        song = "pp" in arch
        for name, weight in net.named_parameters():
            layer = name.split(".")[-2]
            if weight.dim() < 2 or "map_label" in name:
                continue
            fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5 if song else fan_in**-0.5
            scale = (
                {"qkv": 0.2**0.5, "conv1": 1e-5, "proj": 1e-5, "out_conv": 1e-5} if song else {"conv1": 0, "proj": 0}
            )
            bound *= 0 if layer == "affine_s" else scale.get("out_conv" if "out_conv" in name else layer, 1)
            assert 0.9 * bound <= weight.abs().max() <= bound * 1.0001, (arch, name)
        for name, bias in net.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                zero = song or name.split(".")[-2] in ("conv1", "proj", "affine_s")
                assert (bias.abs().max() == 0) == zero, (arch, name)


@pytest.mark.parametrize("s_branch", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_augmentation_labels_are_heard_and_may_be_absent(arch: str, s_branch: bool) -> None:
    net = random_network(replace(SMALL[arch], augment_dim=9), s_branch=s_branch)
    x, t, s, labels = inputs(2)
    given = (x, t, s if s_branch else None, labels)
    assert torch.equal(net(*given), net(*given, torch.zeros(2, 9)))
    difference = (net(*given) - net(*given, torch.tensor([[0.0] * 9, [1.0] + [0.0] * 8]))).abs().amax((1, 2, 3))
    assert difference[0] < 1e-6 < 1e-4 < difference[1]
    with pytest.raises(ValueError, match=r"augment_labels: expected \[2, 9\], got \[2, 3\]"):
        net(*given, torch.zeros(2, 3))
    without = random_network(SMALL[arch], s_branch=s_branch)
    with pytest.raises(ValueError, match="augment_labels: expected None for a network without that input"):
        without(*given, torch.zeros(2, 9))
    if not s_branch:
        model, augment_labels = EDMDenoiser(net), torch.ones(2, 9)
        assert (model.denoise(x, t, labels, augment_labels) - model.denoise(x, t, labels)).abs().max() > 1e-4


@pytest.mark.parametrize("s_branch", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_label_dropout_is_the_null_label_of_some_samples_in_training(arch: str, s_branch: bool) -> None:
    net = random_network(replace(SMALL[arch], label_dropout=0.25), s_branch=s_branch)
    batch = 256
    x, t, s, _ = inputs(1)
    x, t, s = x.expand(batch, -1, -1, -1), t.expand(batch), s.expand(batch)
    given = (x, t, s if s_branch else None)
    with torch.no_grad():
        labelled = net(*given, torch.full((batch,), 3))
        null = net(*given, torch.zeros(batch, 5))
        dropped = net.train()(*given, torch.full((batch,), 3))
    assert (labelled - null).abs().max() > 1e-3
    is_null = (dropped - null).abs().amax((1, 2, 3)) < 1e-5
    is_labelled = (dropped - labelled).abs().amax((1, 2, 3)) < 1e-5
    assert torch.equal(is_null, ~is_labelled)
    assert 30 < is_null.sum() < 100  # 64 expected, standard deviation 7


@pytest.mark.parametrize("arch", ARCHS)
def test_dropout_is_of_training_alone(arch: str) -> None:
    net = random_network(replace(SMALL[arch], dropout=0.5), s_branch=False)
    x, t, _, labels = inputs(2)
    assert torch.equal(net(x, t, None, labels), net(x, t, None, labels))
    net.train()
    assert not torch.equal(net(x, t, None, labels), net(x, t, None, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHS)
def test_dtype_and_memory_format(arch: str, dtype: torch.dtype) -> None:
    """The image's dtype is the output's; what lies between its layers is channels_last in that dtype."""
    net = random_network(SMALL[arch], s_branch=True)
    seen: list[Tensor] = []
    for block in [*net.enc.values(), *net.dec.values()]:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    x, t, s, labels = inputs(2)
    F_x = net(x.to(dtype), t, s, labels)
    assert F_x.dtype == dtype
    assert len(seen) == len(net.enc) + len(net.dec) - 1  # the last block is called in two pieces
    for output in (*seen, F_x):
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=torch.channels_last)
    weights = [weight for weight in net.parameters() if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.long) for b in ("aot_eager", "inductor"))]
)
@pytest.mark.parametrize("arch", ARCHS)
def test_two_graphs_serve_any_batch_size(arch: str, backend: str) -> None:
    """A graph for batch 1 and one for all others, without a break; the values are those of eager mode."""
    torch._dynamo.reset()
    model = CTM(random_network(SMALL[arch], s_branch=True))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.jump, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (1, 3, 8):
            arguments = inputs(batch)
            torch.testing.assert_close(compiled(*arguments), model.jump(*arguments), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_two_graphs_serve_a_teacher_and_its_gradients(arch: str) -> None:
    """As in training: label dropout, dropout and augmentation, forward and backward."""
    torch._dynamo.reset()
    net = random_network(replace(SMALL[arch], dropout=0.1, label_dropout=0.1, augment_dim=9), s_branch=False).train()
    model = EDMDenoiser(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.denoise, backend=counter, fullgraph=True)
    for batch in (1, 3, 8):
        x, t, _, labels = inputs(batch)
        compiled(x, t, labels, torch.randn(batch, 9)).sum().backward()
    assert counter.frame_count == 2
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("backend", [None, *(backend for backend in BACKENDS if backend != "reference")])
@pytest.mark.parametrize("arch", ARCHS)
def test_fused_is_reference_in_forward_and_every_gradient(arch: str, backend: Backend | None) -> None:
    """The default kernels, and each kind of kernel wherever it is by design."""
    reason = None if backend is None else unavailable(backend, "cpu")
    if reason:
        pytest.skip(reason)
    model = CTM(random_network(SMALL[arch], s_branch=True))
    x, t, s, labels = inputs(3)
    towards = torch.randn(3, 3, 8, 8)

    def run() -> tuple[Tensor, list[Tensor]]:
        leaf = x.clone().requires_grad_()
        G_x = model.jump(leaf, t, s, labels)
        return G_x.detach(), list(torch.autograd.grad((G_x * towards).sum(), [leaf, *model.parameters()]))

    with use_reference():
        expected, gradients = run()
    with contextlib.nullcontext() if backend is None else use_backend(backend):
        actual, ours = run()
    # ADM's table multiplies ln t by 250: half an ulp of it, by which two logarithms may differ, is seen.
    tolerance = 1e-4 if arch == "adm" else 1e-5
    assert_agree(actual, expected, tolerance)
    largest = max(gradient.abs().max() for gradient in gradients)
    for name, ours_, gradient in zip(["x", *dict(model.named_parameters())], ours, gradients, strict=True):
        error = (ours_ - gradient).abs().max()
        assert error <= 2 * tolerance * gradient.abs().max() + 0.1 * tolerance * largest, name
