"""Traces by probes, in reverse and in forward mode, against the Jacobian written out."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ctm_fast.evaluation.traces import Mode, draw_probes, quadratic_forms
from ctm_fast.ops import precond_combine, serving, use_reference

SHAPE = (1, 2, 3)


@pytest.fixture
def planted() -> Iterator[Callable[[Tensor], Tensor]]:
    """An op as a fused kernel is registered: opaque, with a gradient in reverse mode and none in forward mode."""
    library = torch.library.Library("planted", "FRAGMENT")
    library.define("sine(Tensor x) -> Tensor")
    library.define("cosine(Tensor x) -> Tensor")
    library.impl("sine", lambda x: torch.from_numpy(np.sin(x.numpy())), "CPU")
    library.impl("cosine", lambda x: torch.from_numpy(np.cos(x.numpy())), "CPU")

    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]

    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.ops.planted.cosine(ctx.saved_tensors[0])  # type: ignore[attr-defined]

    torch.library.register_autograd("planted::sine", backward, setup_context=setup_context, lib=library)
    yield torch.ops.planted.sine
    library._destroy()


def curved(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    weight = torch.linspace(-1, 1, 36, dtype=x.dtype).view(6, 6)
    return (torch.sin(flat @ weight) * flat.square()).view_as(x)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "exact"])
def test_quadratic_forms_are_those_of_the_jacobian(mode: Mode, kind: str, generator: torch.Generator) -> None:
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=generator)
    probes = draw_probes(torch.arange(3), SHAPE, kind=kind, count=4)
    D_x, forms = quadratic_forms(curved, x, probes, mode=mode)
    torch.testing.assert_close(D_x, curved(x))
    assert not D_x.requires_grad and not forms.requires_grad
    for b in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda one: curved(one[None])[0], x[b]).view(6, 6)
        expected = torch.einsum("ki,ij,kj->k", probes[:, b], jacobian, probes[:, b])
        torch.testing.assert_close(forms[b], expected)
        if kind == "exact":
            torch.testing.assert_close(forms[b].sum(), jacobian.trace())


def test_an_op_with_reverse_mode_alone_raises_in_forward_mode(planted: Callable[[Tensor], Tensor]) -> None:
    """Where PyTorch by itself gives zero tangents without a word; the planted op is right in reverse mode."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, *SHAPE)
    probes = draw_probes(torch.arange(2), SHAPE, kind="exact", count=1)

    def denoise(x: Tensor) -> Tensor:
        return 0.5 * x + planted(x)

    _, forms = quadratic_forms(denoise, x, probes)
    torch.testing.assert_close(forms.sum(1), (0.5 + x.cos()).flatten(1).sum(1))
    _, silent = torch.func.jvp(denoise, (x,), (torch.ones_like(x),))
    assert torch.equal(silent, torch.full_like(x, 0.5)), "the trap: the op's own tangent is lost"
    with pytest.raises(NotImplementedError, match="jvp"):
        quadratic_forms(denoise, x, probes, mode="forward")


def test_our_fused_ops_raise_in_forward_mode_and_the_reference_serves() -> None:
    x = torch.linspace(-1, 1, 12).view(2, *SHAPE)
    probes = draw_probes(torch.arange(2), SHAPE, kind="rademacher", count=2)
    t, s = torch.full((2,), 0.7), torch.zeros(2)

    def denoise(x: Tensor) -> Tensor:
        return precond_combine(x, x.square(), t, s)

    if serving("precond_combine", "cpu") != "reference":
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            quadratic_forms(denoise, x, probes, mode="forward")
    _, expected = quadratic_forms(denoise, x, probes)
    with use_reference():
        _, forms = quadratic_forms(denoise, x, probes, mode="forward")
    torch.testing.assert_close(forms, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_depend_on_x_is_not_taken_for_zero() -> None:
    x = torch.ones(1, *SHAPE)
    with pytest.raises(NotImplementedError, match="got no tangent"):
        quadratic_forms(
            lambda x: torch.ones(1, *SHAPE),
            x,
            draw_probes(torch.arange(1), SHAPE, kind="exact", count=1),
            mode="forward",
        )


def test_probes_belong_to_the_seed() -> None:
    seeds = torch.tensor([3, 4, 5])
    probes = draw_probes(seeds, SHAPE, kind="rademacher", count=4)
    assert probes.shape == (4, 3, 6)
    assert (probes.abs() == 1).all()
    assert torch.equal(draw_probes(seeds[1:2], SHAPE, kind="rademacher", count=4), probes[:, 1:2])
    assert not torch.equal(probes[0], probes[1])
    assert torch.equal(draw_probes(seeds, SHAPE, kind="exact", count=1)[:, 1], torch.eye(6, dtype=torch.float64))
