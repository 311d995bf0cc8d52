"""The description of a network, and the network built from it."""

from dataclasses import dataclass

from ctm_fast.models.song_unet import SongUNet

ARCHITECTURES = ("ddpmpp",)


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture and sizes of F_theta; the arguments of :class:`~ctm_fast.models.SongUNet`."""

    arch: str = "ddpmpp"
    img_resolution: int = 32
    img_channels: int = 3
    label_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.13
    head_channels: int = 0


def build_network(config: NetworkConfig, *, s_branch: bool) -> SongUNet:
    """The network that ``config`` describes, freshly initialised; with the second level s if ``s_branch``.

    Raises ValueError for an architecture that is not one of ``ARCHITECTURES`` or sizes that do not fit together.
    """
    if config.arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {config.arch!r}")
    sizes = {key: value for key, value in vars(config).items() if key != "arch"}
    return SongUNet(**sizes, s_branch=s_branch)
