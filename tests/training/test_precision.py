"""What is computed in float32 whatever the network computes in, and the scale of losses in float16."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.errors import ConfigError
from ctm_fast.losses import dsm_loss
from ctm_fast.models import ARCHITECTURES, CTM, build_network
from ctm_fast.nn import GroupNorm
from ctm_fast.ops import attention
from ctm_fast.training.finite import FiniteGuard
from ctm_fast.training.precision import LossScale, compute_dtype, resolve
from ctm_fast.training.radam import RAdam

CPU = torch.device("cpu")
HALVES = {"bf16": 2.0**-9, "fp16": 2.0**-12}
"""Precision -> half of the distance between neighbours, relative."""


def model(arch: str, precision: str, channels: int = 32) -> CTM:
    """A small network with weights that keep the size of what passes through."""
    torch.manual_seed(0)
    net = build_network(
        arch=arch,
        img_resolution=16,
        model_channels=channels,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(8,),
        dropout=0.0,
        label_dim=4,
        s_branch=True,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return CTM(net, dtype=compute_dtype(precision)).train()


def losses(ctm: CTM, batch: int = 8) -> Tensor:
    """A jump and a denoising, as a training step makes them."""
    generator = torch.Generator().manual_seed(2)
    x = 3 * torch.randn(batch, 3, 16, 16, generator=generator)
    x0 = 0.3 * torch.randn(batch, 3, 16, 16, generator=generator)
    t = torch.linspace(0.1, 20, batch)
    labels = torch.arange(batch) % 4
    x_s, D_x = ctm.jump(x, t, t / 2, labels), ctm.denoise(x, t, labels)
    assert x_s.dtype == D_x.dtype == torch.float32
    return x_s.square().mean() + dsm_loss(D_x, x0, t, sigma_data=0.5).mean()


def gradients(ctm: CTM, batch: int = 8) -> dict[str, Tensor]:
    """Of :func:`losses` in every parameter."""
    ctm.zero_grad()
    losses(ctm, batch).backward()
    return {name: parameter.grad for name, parameter in ctm.named_parameters() if parameter.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors."""
    norm = sum(float(b[name].square().sum()) for name in b) ** 0.5
    return sum(float((a[name] - b[name]).square().sum()) for name in b) ** 0.5 / norm


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_in_half_precision(arch: str) -> None:
    """They reach every float32 parameter in float32, and differ by a few roundings, eight times finer in float16."""
    exact = gradients(model(arch, "fp32"))
    for precision, half in HALVES.items():
        got = gradients(model(arch, precision))
        assert got.keys() == exact.keys()
        assert {gradient.dtype for gradient in got.values()} == {torch.float32}
        assert half / 4 < distance(got, exact) < 8 * half, precision


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_embeddings_are_float32s(arch: str) -> None:
    """Bit for bit those of a network in float32, and so are their projections to the first block's channels."""
    seen: dict[str, list[Tensor]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        ctm = model(arch, precision)
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, found: list[Tensor] = found) -> None:
            found.extend(output if isinstance(output, tuple) else (output,))

        ctm.net.embedding.register_forward_hook(keep)
        next(block for name, block in ctm.net.enc.items() if "block" in name).affine.register_forward_hook(keep)
        losses(ctm)
        seen[precision] = found
    assert len(seen["fp32"]) == 6
    for precision in ("bf16", "fp16"):
        assert all(torch.equal(*pair) for pair in zip(seen[precision], seen["fp32"], strict=True))


def check_norm(norm: Callable[[Tensor], Tensor]) -> None:
    """A norm of bfloat16 values whose mean and variance bfloat16 does not have."""
    torch.manual_seed(4)
    x = (64 + 0.5 * torch.randint(0, 2, (2, 8, 16, 16))).bfloat16()
    exact = functional.group_norm(x.double(), 2)
    assert (norm(x).double() - exact).abs().max() < 2.0**-8


def test_norm_statistics_are_float32s() -> None:
    check_norm(GroupNorm(8))
    with pytest.raises(AssertionError):  # the same, computed in bfloat16
        check_norm(_norm_in_bfloat16)


def _norm_in_bfloat16(x: Tensor) -> Tensor:
    grouped = x.reshape(2, 2, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    return ((grouped - mean) * (variance + 1e-6).rsqrt()).reshape(x.shape)


def check_softmax(attend: Callable[[Tensor], Tensor]) -> None:
    """Logits 64 + d with |d| <= 1/2, of which bfloat16 keeps nothing."""
    torch.manual_seed(4)
    q, v = torch.full((1, 64, 8, 8), 4.0), torch.randn(1, 64, 8, 8)
    k = torch.full((1, 64, 8, 8), 2.0)
    k[:, 0] += torch.linspace(-64, 64, 64).round().view(8, 8) / 64
    qkv = torch.cat([q, k, v], 1).bfloat16()
    q, k, v = qkv.double().flatten(2).chunk(3, 1)
    exact = v @ (q.transpose(1, 2) @ k / 8).softmax(2).transpose(1, 2)
    assert (attend(qkv).double().flatten(2) - exact).abs().max() < 0.01 * exact.abs().max()


def test_softmax_is_float32s() -> None:
    check_softmax(partial(attention, heads=1))
    with pytest.raises(AssertionError):  # the same, computed in bfloat16
        check_softmax(_attention_in_bfloat16)


def _attention_in_bfloat16(qkv: Tensor) -> Tensor:
    q, k, v = qkv.flatten(2).chunk(3, 1)
    return v @ (q.transpose(1, 2) @ k / 8).softmax(2).transpose(1, 2)


def test_preconditioning_is_float32s() -> None:
    """At a small level the image passes almost unchanged, with digits that bfloat16 has not."""
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.full((2,), 0.002)
    labels = torch.tensor([0, 3])
    exact, got = (model("ddpmpp", name).jump(x, t, t / 2, labels) for name in ("fp32", "bf16"))
    assert 0 < (got - exact).abs().max() < 0.05 * 2.0**-9 * x.abs().max()


def test_float16_recovers_from_overflow() -> None:
    """A scale that overflows is halved, without a trace in the weights, until gradients are those of float32."""
    ctm = model("ddpmpp", "fp16", 8)
    start = copy.deepcopy(ctm.state_dict())
    exact = gradients(model("ddpmpp", "fp32", 8), 2)
    optimizer = RAdam(ctm.parameters(), lr=1e-3)
    guard, scale = FiniteGuard(30, CPU), LossScale(CPU, start=2.0**18, growth_interval=3)
    values, first = [], None
    for step in range(1, 25):
        optimizer.zero_grad()
        loss = losses(ctm, 2)
        scale.scale(loss).backward()
        found = [parameter.grad for parameter in ctm.parameters() if parameter.grad is not None]
        optimizer.found_inf = guard.check(step, {"loss": loss}, torch.nn.utils.get_total_norm(found))
        optimizer.grad_scale = scale.value
        if optimizer.found_inf == 0 and first is None:
            assert all(torch.equal(value, start[name]) for name, value in ctm.state_dict().items())
            first = step
            copies = {name: p.grad.clone() for name, p in ctm.named_parameters() if p.grad is not None}
            torch._foreach_div_(list(copies.values()), scale.value)
            assert distance(copies, exact) < 8 * HALVES["fp16"]
        optimizer.step()
        scale.update(optimizer.found_inf)
        values.append(float(scale.value))
        if len(values) - (first or step) == 2:
            break
    assert first is not None and first > 3
    assert guard.gather("ctm") == first - 1
    assert values[: first - 1] == [2.0 ** (18 - count) for count in range(1, first)]
    assert values[-1] == 2 * values[-2] == 2 * values[-3]  # three finite steps
    with torch.no_grad():
        assert losses(ctm, 2) < losses(model("ddpmpp", "fp16", 8), 2)


def test_scale_goes_on_from_its_state() -> None:
    whole = LossScale(CPU, growth_interval=4)
    resumed = LossScale(CPU, start=1.0, growth_interval=4)
    for flag in (1.0, 0.0, 0.0, 0.0):
        whole.update(torch.tensor(flag))
    assert float(whole.value) == 2.0**15
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for scale in (whole, resumed):
        scale.update(torch.tensor(0.0))
    assert float(resumed.value) == float(whole.value) == 2.0**16


def test_names() -> None:
    assert compute_dtype("bf16") == torch.bfloat16
    assert resolve("auto", CPU) == "fp32" and resolve("fp16", CPU) == "fp16"
    with pytest.raises(ConfigError, match="precision: expected one of fp32, bf16, fp16, got 'half'"):
        compute_dtype("half")
