"""Published weights to our models and back, and a teacher's to its student's; exact in each direction.

Names are in ``published_names``; what a file holds is found out by ``describe``. Besides, the rows of EDM's qkv
convolutions are interleaved within a head, where ours are three-major, and guided-diffusion's label table is the
transpose of ours: both are permuted once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.config import NetworkConfig
from ctm_fast.models.ctm import CTM
from ctm_fast.models.describe import PREFIX, describe
from ctm_fast.models.edm import EDMDenoiser
from ctm_fast.models.published_names import SCHEMES, published_filters, published_names
from ctm_fast.models.unet import UNet, Weightless, build_network, empty_as

S_INITS = ("zero", "published")
"""How the s-branch of a new student may start."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def from_published(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | NetworkConfig | None = None,
    *,
    shapes: Mapping[str, Tensor] | None = None,
) -> CTM | EDMDenoiser:
    """The model of a published state dict: a CTM if it has an s-branch, else an EDM denoiser; float32.

    Args:
        tensors: name -> tensor in float32, float16 or bfloat16; asked for one at a time, so that they may lie on disk.
        config: what :func:`ctm_fast.models.describe` takes, for what names and shapes do not tell.
        shapes: the same as ``tensors``, on the meta device: so tensors on disk are read once, and not for shapes too.

    Raises CheckpointError naming what is missing, left over, of another shape or dtype, or not as ``config`` says.
    """
    described = describe(tensors if shapes is None else shapes, config)
    device = next(iter(tensors.values())).device
    try:
        with device, Weightless():  # what is refused must not take a network's memory
            net = build_network(described.network, s_branch=described.s_branch)
    except Exception as error:  # a foreign description may fail at any depth
        reason = " ".join(str(error).split())
        raise CheckpointError(f"tensors: expected sizes that fit together, got {reason} ({described})") from error
    prefix = SCHEMES[net.config.arch].prefix
    given = {prefix + name.removeprefix(PREFIX): name for name in tensors}
    if len(given) < len(tensors):
        raise CheckpointError(f"tensors: expected each one once, got some both with {PREFIX} and without")
    names, filters = published_names(net), published_filters(net)
    wanted = {names[ours]: _layout(net, ours, t, published=True).shape for ours, t in net.state_dict().items()}
    wanted |= {name: value.shape for name, value in filters.items()}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(f"tensors: {len(missing)} missing {missing[:3]}, {len(extra)} left over {extra[:3]}")

    def read(name: str) -> Tensor:
        tensor = tensors[given[name]]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.shape != wanted[name]:
            raise CheckpointError(f"{name}: expected shape {list(wanted[name])}, got {list(tensor.shape)}")
        return tensor

    for name, value in filters.items():
        tensor = read(name)
        if not tensor.is_meta and not torch.equal(tensor.float().cpu(), value):
            raise CheckpointError(f"{name}: expected the filter of architecture {net.config.arch}, got another")
    weights = {}
    with torch.no_grad():
        for ours, place in net.state_dict().items():  # one at a time, so that no second copy of all is held
            weight = _layout(net, ours, read(names[ours]), published=False)
            weights[ours] = empty_as(place, device).copy_(weight)
    net.load_state_dict(weights, assign=True)
    return (CTM if described.s_branch else EDMDenoiser)(net, described.sigma_data)


def to_published(model: CTM | EDMDenoiser) -> dict[str, Tensor]:
    """The state dict of the published code: its names, order of channels and buffers."""
    return {name: tensor.contiguous() for name, tensor in published_views(model).items()}


def published_views(model: CTM | EDMDenoiser) -> dict[str, Tensor]:
    """The same, of any strides and mostly views of the model's weights: what is only written needs no copy."""
    net = model.net
    names = published_names(net)
    tensors = {names[ours]: _layout(net, ours, tensor, published=True) for ours, tensor in net.state_dict().items()}
    device = net.out_conv.weight.device
    return tensors | {name: value.to(device) for name, value in published_filters(net).items()}


def student_from_teacher(teacher: EDMDenoiser, *, s_init: str = "zero") -> CTM:
    """A student with the teacher's weights and a fresh s-branch. It is not told of augmentations.

    Args:
        teacher: of any architecture; a published one is an import away.
        s_init: ``zero``: the student starts as the teacher, bit for bit, at any s; ``published``: as the published
            code starts it, the s-branch random and the teacher's function lost at the first step.
    """
    if s_init not in S_INITS:
        raise ValueError(f"s_init: expected {' or '.join(S_INITS)}, got {s_init!r}")
    net = build_network(replace(teacher.net.config, augment_dim=0), s_branch=True)
    weights = {name: t for name, t in teacher.net.state_dict().items() if "embedding.map_augment." not in name}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if unexpected or not all("_s." in name for name in missing):
        raise ValueError(f"teacher: expected the student's network without its s-branch, got {missing} {unexpected}")
    if s_init == "published":
        net.draw_s_branch()
    return CTM(net, teacher.sigma_data, dtype=teacher.dtype)


def _layout(net: UNet, name: str, tensor: Tensor, *, published: bool) -> Tensor:
    """A tensor by our name as published files lay it out (``published``), or from there as ours is."""
    scheme = SCHEMES[net.config.arch]
    module, _, _ = name.rpartition(".")
    if module in scheme.transposed:
        return tensor.t()
    if not (scheme.interleaved_qkv and module.endswith(".qkv")):
        return tensor
    # (head, channel, q/k/v) there, (q/k/v, head, channel) here
    split = (3, -1) if published else (-1, 3)
    return tensor.reshape(*split, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
