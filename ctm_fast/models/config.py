"""The description of a network, and those of the published ones."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture and sizes of F_theta, without and with the s-branch."""

    arch: str = "ddpmpp"
    """A key of :data:`ctm_fast.models.ARCHITECTURES`."""
    img_resolution: int = 32
    img_channels: int = 3
    label_dim: int = 0
    """Number of classes; 0 for an unconditional network."""
    model_channels: int = 128
    """``channel_mult`` times this is the width of each level."""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = (16,)
    """The levels whose blocks attend; the decoder's first block always does."""
    dropout: float = 0.13
    """Of the activations before each second convolution."""
    head_channels: int = 0
    """Channels of an attention head; 0 for one head."""
    label_dropout: float = 0.0
    """Probability in training that a sample's label is dropped, for classifier-free guidance."""
    augment_dim: int = 0
    """Inputs that tell a training image's augmentation (9 in EDM's pipeline); 0 for none."""


def _imagenet64(arch: str, dropout: float) -> NetworkConfig:
    return NetworkConfig(
        arch=arch,
        img_resolution=64,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=dropout,
        head_channels=64,
    )


NETWORKS: dict[str, NetworkConfig] = {
    "cifar10-ddpmpp": NetworkConfig(arch="ddpmpp"),
    "cifar10-ncsnpp": NetworkConfig(arch="ncsnpp"),
    "imagenet64-adm": _imagenet64("adm", dropout=0.0),
    "imagenet64-dhariwal": _imagenet64("dhariwal", dropout=0.1),
}
"""The published sizes: EDM's and CTM's CIFAR-10 networks (unconditional; label_dim=10 makes the other), openai's and
CTM's ImageNet network, and EDM's."""


def network_preset(name: str) -> NetworkConfig:
    """The entry ``name`` of :data:`NETWORKS`; ValueError naming the nearest one if there is none."""
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NETWORKS)}"
        raise ValueError(f"network: unknown {name!r}; {hint}")
    return NETWORKS[name]


def check_sizes(network: NetworkConfig) -> None:
    """ValueError naming the first size that no network has."""
    if not network.channel_mult:
        raise ValueError("channel_mult: expected a level at least, got none")
    lowest = {"img_resolution": 1, "img_channels": 1, "model_channels": 1, "num_blocks": 1}
    for name, least in {**lowest, "label_dim": 0, "head_channels": 0, "augment_dim": 0}.items():
        value = getattr(network, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(network, name) < 1:
            raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(network, name)}")


def check_fits(network: NetworkConfig, tensors: int, elements: int) -> None:
    """ValueError if a file of so many tensors and elements cannot hold ``network``: then it must not be built.

    Building takes time and memory by the number of blocks and the width of the noise level's features.
    """
    blocks = len(network.channel_mult) * (max(network.num_blocks, 0) + 1)
    if blocks > tensors or network.model_channels > elements:
        raise ValueError(
            f"expected a network of the file's size, got {blocks} blocks and {network.model_channels} channels for "
            f"{tensors} tensors of {elements} elements"
        )
