"""One step of a gamma sampler: the raw network output becomes the jump, and the jump the next, noisier image."""

from typing import Any

from torch import Tensor, empty_like

from ctm_fast.ops._checks import FLOATS, check, check_image, dense, same_format
from ctm_fast.ops._library import define, kernel
from ctm_fast.ops.philox_normal import Stream, check_seeds


def gamma_step(
    x: Tensor,
    F_x: Tensor,
    t: Tensor,
    s: Tensor,
    t_next: Tensor,
    seeds: Tensor,
    step: int,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Jump from noise level ``t`` down to ``s``, then noise up to ``t_next``, in one pass.

        x_next = G(x, t, s) + sqrt((t_next - s)(t_next + s)) n       CTM (arXiv 2310.02279), Algorithm 3

    G is :func:`~ctm_fast.ops.precond_combine`, and the result where ``t_next = s`` (on a CPU to the bit); n is
    :func:`~ctm_fast.ops.philox_normal` of (``seeds``, ``step``) on ``Stream.RENOISE``, made inside the kernel.

    Args:
        x: [B, C, H, W] float32, the noisy image, contiguous or channels_last (anything else is copied).
        F_x: [B, C, H, W] float32, bfloat16 or float16, the raw output of the network.
        t, s, t_next: [B] float32, 0 <= s <= t, 0 < t and s <= t_next (not checked: reading a value would synchronise).
        seeds: [B] int64, each 0 to 2^63 - 1, as for ``philox_normal``.
        step: 0 to 2^32 - 1, another one at each step of a sampler.
        sigma_data: standard deviation of the data.

    Returns:
        x_next [B, C, H, W] float32 in the memory format of ``x``, differentiable in ``x`` and ``F_x``, any number of
        times; not in the levels, nor in forward mode, outside :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape, device or range; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("x", x)
    check("F_x", F_x, like=x, dtypes=FLOATS)
    check("t", t, like=x, shape=x.shape[:1])
    check("s", s, like=x, shape=x.shape[:1])
    check("t_next", t_next, like=x, shape=x.shape[:1])
    check_seeds(seeds, step, like=x)
    serve = kernel("gamma_step", x, F_x, constants=(t, s, t_next))
    x = dense(x)
    levels = t.contiguous(), s.contiguous(), t_next.contiguous()
    return serve(x, same_format(F_x, x), *levels, seeds.contiguous(), step, int(Stream.RENOISE), sigma_data)


def _fake(
    x: Tensor,
    F_x: Tensor,
    t: Tensor,
    s: Tensor,
    t_next: Tensor,
    seeds: Tensor,
    step: int,
    stream: int,
    sigma_data: float,
) -> Tensor:
    return empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, F_x, t, s, *_, ctx.sigma_data = inputs
    ctx.F_dtype = F_x.dtype
    ctx.save_for_backward(t, s)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """That of the jump: the noise depends on neither image."""
    t, s = ctx.saved_tensors
    need_x, need_F = ctx.needs_input_grad[:2]
    grad_x, grad_F = ops.precond_combine_backward(dense(grad), t, s, ctx.sigma_data, ctx.F_dtype, need_x, need_F)
    return grad_x if need_x else None, grad_F if need_F else None, *(None,) * 7


define("gamma_step", "gamma_step", fake=_fake, setup_context=_setup_context, backward=_backward)
