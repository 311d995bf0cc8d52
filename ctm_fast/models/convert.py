"""Published state dicts to ours and back: other names, and attention channels in another order.

Published DDPM++ networks hold one flat ``SongUNet`` under ``model.``. Their qkv rows are interleaved
(q0, k0, v0, q1, ...) within a head; ours are three-major, so the rows are permuted once, exactly.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models.config import NetworkConfig, build_network
from ctm_fast.models.song_unet import SongUNet

# What EDM's files hold besides: the box filters of resampling convolutions, and the augmentation label's projection,
# which adds nothing at inference.
_DROPPED = re.compile(r"\.resample_filter$|^map_augment\.")
_PREFIX = "model."


def from_published(tensors: Mapping[str, Tensor], config: NetworkConfig) -> SongUNet:
    """The network of a published DDPM++ state dict (EDM teacher or CTM student, told apart by its names).

    Raises CheckpointError naming what is missing, left over or of another shape.
    """
    names = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    s_branch = any(name.startswith("map_layer0_s.") for name in names)
    network = build_network(config, s_branch=s_branch)
    state = {
        _ours(name): _permute_qkv(name, tensor, config, interleaved=True)
        for name, tensor in names.items()
        if not _DROPPED.search(name)
    }
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(f"tensors: {len(missing)} missing {missing[:3]}, {len(extra)} left over {extra[:3]}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{name}: expected shape {list(expected[name].shape)}, got {list(tensor.shape)}")
    network.load_state_dict(state)
    return network


def to_published(network: SongUNet, config: NetworkConfig) -> dict[str, Tensor]:
    """The parameters under the published names and in the published order of channels."""
    return {
        _PREFIX + _published(name, network): _permute_qkv(name, tensor, config, interleaved=False)
        for name, tensor in network.state_dict().items()
    }


def _ours(name: str) -> str:
    name = re.sub(r"^(map_label|map_layer[01](?:_s)?)\.", r"embedding.\1.", name)
    name = re.sub(r"^dec\.\d+x\d+_aux_(norm|conv)\.", r"out_\1.", name)
    return re.sub(r"\.(norm2|qkv|proj)\.", r".attention.\1.", name)


def _published(name: str, network: SongUNet) -> str:
    size = network.img_resolution
    name = name.removeprefix("embedding.")
    name = re.sub(r"^out_(norm|conv)\.", rf"dec.{size}x{size}_aux_\1.", name)
    return name.replace(".attention.", ".")


def _permute_qkv(name: str, tensor: Tensor, config: NetworkConfig, *, interleaved: bool) -> Tensor:
    """Rows of a qkv convolution: (head, channel, qkv) in published files, (qkv, head, channel) in ours."""
    if ".qkv." not in name:
        return tensor
    channels = tensor.shape[0] // 3
    heads = channels // config.head_channels if config.head_channels else 1
    rest = tensor.shape[1:]
    if interleaved:
        return tensor.reshape(heads, channels // heads, 3, *rest).movedim(2, 0).reshape(tensor.shape)
    return tensor.reshape(3, heads, channels // heads, *rest).movedim(0, 2).reshape(tensor.shape)
