"""The published U-Nets, one network in four architectures, and how it is built from a description."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ctm_fast.models.config import NetworkConfig, check_sizes
from ctm_fast.nn import (
    BILINEAR,
    ADMEmbedding,
    BlockStyle,
    Conv2d,
    DownConv2d,
    LevelEmbedding,
    SongEmbedding,
    UNetBlock,
)


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one published U-Net from another of its sizes."""

    style: BlockStyle
    embedding: Callable[..., LevelEmbedding]
    noise_mult: int = 1
    """Channels of the noise level's features, times model_channels."""
    widen_first: bool = False
    """Whether the first convolution has the width of its level, and not model_channels."""
    decoder_attends: bool = False
    """Whether all of the decoder's blocks at ``attn_resolutions`` attend, or the last of a level alone."""
    pyramid: bool = False
    """Whether the encoder takes in the smaller versions of the input image (NCSN++'s residual encoder)."""
    out_scale: float = 1e-5
    """Factor on the initial weights of the last convolution."""


_SONG = BlockStyle()
_ADM = BlockStyle(
    modulate=True,
    residual_scale=1.0,
    project_resampled=False,
    eps=1e-5,
    init="uniform",
    qkv_scale=1.0,
    end_scale=0.0,
)

ARCHITECTURES: dict[str, Architecture] = {
    "ddpmpp": Architecture(_SONG, SongEmbedding),
    "ncsnpp": Architecture(
        replace(_SONG, taps=BILINEAR), partial(SongEmbedding, fourier=True), noise_mult=2, pyramid=True
    ),
    "adm": Architecture(
        replace(_ADM, groups=32),
        partial(ADMEmbedding, c_noise="adm"),
        widen_first=True,
        decoder_attends=True,
        out_scale=1.0,
    ),
    "dhariwal": Architecture(
        _ADM, partial(ADMEmbedding, c_noise="edm"), widen_first=True, decoder_attends=True, out_scale=1.0
    ),
}
"""Name -> what it is. ``ddpmpp`` and ``ncsnpp`` (Song et al., arXiv 2011.13456) as EDM's SongUNet and CTM's CIFAR-10
student have them; ``adm`` (Dhariwal & Nichol, arXiv 2105.05233) as guided-diffusion, consistency models and CTM's
ImageNet student have it, told 250 ln(t); ``dhariwal``: the same as EDM has it, told ln(t) / 4."""


class UNet(nn.Module):
    """F_theta(x; t, s): the raw network between the preconditioning's input and output.

    ``forward(x, t, s=None, labels=None, augment_labels=None)``: x [B, img_channels, H, W] in any float dtype, which is
    also that of the result; t, s [B] float32; labels and augment_labels as :class:`ctm_fast.nn.LevelEmbedding` takes
    them. Computes in channels_last. H and W need not be ``img_resolution``, which tells where attention is.

    ``forward`` is ``tail(*body(...))``. The tail holds both layers W that the published code takes adaptive weights
    at: the last block's second convolution and the output convolution.

    Args:
        config: architecture and sizes.
        s_branch: whether it takes a second noise level s (a CTM student does, an EDM teacher does not).

    Raises ValueError, naming the size, for sizes that do not fit together.
    """

    def __init__(self, config: NetworkConfig, *, s_branch: bool) -> None:
        super().__init__()
        if config.arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {config.arch!r}")
        check_sizes(config)
        levels = len(config.channel_mult)
        if config.img_resolution % 2 ** (levels - 1):
            raise ValueError(
                f"img_resolution: expected a multiple of {2 ** (levels - 1)} for {levels} levels, "
                f"got {config.img_resolution}"
            )
        self.config = config
        self.img_resolution = config.img_resolution
        self.img_channels = config.img_channels
        self.label_dim = config.label_dim
        self.s_branch = s_branch
        arch = ARCHITECTURES[config.arch]
        self._residual_scale = arch.style.residual_scale
        self._checkpointing = False
        emb_channels = 4 * config.model_channels

        def block(channels: int, out_channels: int, *, attention: bool = False, **resample: Any) -> UNetBlock:
            head = config.head_channels
            if attention and head and out_channels % head:
                raise ValueError(f"head_channels: expected a divisor of {out_channels} channels, got {head}")
            return UNetBlock(
                channels,
                out_channels,
                emb_channels,
                style=arch.style,
                s_branch=s_branch,
                attention=attention,
                heads=out_channels // head if attention and head else 1,
                dropout=config.dropout,
                **resample,
            )

        self.embedding = arch.embedding(
            arch.noise_mult * config.model_channels,
            emb_channels,
            label_dim=config.label_dim,
            label_dropout=config.label_dropout,
            augment_dim=config.augment_dim,
            s_branch=s_branch,
        )
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        widths = [config.model_channels * mult for mult in config.channel_mult]
        sizes = [config.img_resolution >> level for level in range(levels)]
        channels = widths[0] if arch.widen_first else config.model_channels
        pyramid_channels = config.img_channels
        skips = []
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv2d(config.img_channels, channels, 3, init=arch.style.init)
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, resample="down")
                if arch.pyramid:
                    self.enc[f"{size}x{size}_aux_residual"] = DownConv2d(
                        pyramid_channels, channels, taps=arch.style.taps
                    )
                    pyramid_channels = channels
            skips.append(channels)
            for index in range(config.num_blocks):
                attention = size in config.attn_resolutions
                self.enc[f"{size}x{size}_block{index}"] = block(channels, width, attention=attention)
                channels = width
                skips.append(channels)
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if level == levels - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, resample="up")
            for index in range(config.num_blocks + 1):
                attends = arch.decoder_attends or index == config.num_blocks
                self.dec[f"{size}x{size}_block{index}"] = block(
                    channels + skips.pop(), width, attention=attends and size in config.attn_resolutions
                )
                channels = width
        self.out_norm = arch.style.norm(channels)
        self.out_conv = Conv2d(channels, config.img_channels, 3, init=arch.style.init, scale=arch.out_scale)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its stubs

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        return self.tail(*self.body(x, t, s, labels, augment_labels))

    def body(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything up to the last block's second convolution: its input and that block's skip path."""
        emb, emb_s = self.embedding(t, s, labels, augment_labels)
        x = x.contiguous(memory_format=torch.channels_last)
        pyramid = x
        skips: list[Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, DownConv2d):
                # It joins what the block before it gave, also as what the decoder will see of it.
                x = pyramid = skips[-1] = (x + layer(pyramid)) * self._residual_scale
                continue
            x = self._run(layer, x, emb, emb_s) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in list(self.dec.items())[:-1]:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(layer, x, emb, emb_s)
        h, skip = self._run(self.last_block.first, torch.cat([x, skips.pop()], dim=1), emb, emb_s)
        return h, skip

    def tail(self, h: Tensor, skip: Tensor) -> Tensor:
        """F_x from what :meth:`body` returned."""
        x = self.last_block.second(h, skip)
        return self.out_conv(self.out_norm(x, silu=True))

    def checkpoint_blocks(self) -> None:
        """From now on keep of each block of the body its inputs alone, and run it again in the backward pass.

        Less memory for a third more work in training; gradients, dropout among them, are the same bits.
        """
        self._checkpointing = True

    def _run(self, block: Callable[..., Any], *inputs: Tensor | None) -> Any:
        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @property
    def last_block(self) -> UNetBlock:
        """The block that is cut between :meth:`body` and :meth:`tail`."""
        block = list(self.dec.values())[-1]
        assert isinstance(block, UNetBlock)
        return block

    def tail_parameters(self) -> list[nn.Parameter]:
        """The parameters that :meth:`tail` uses, and :meth:`body` does not."""
        modules = [self.last_block.conv1, self.last_block.attention, self.out_norm, self.out_conv]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def draw_s_branch(self) -> None:
        """Start the s-branch as the published code does: random, so that s matters from the first step."""
        for module in self.modules():
            if isinstance(module, UNetBlock):
                module.draw_s_branch()


def build_network(config: NetworkConfig | None = None, *, s_branch: bool, **sizes: Any) -> UNet:
    """A freshly initialised network; with the second level s, whose effect starts at zero, if ``s_branch``.

        build_network(arch="adm", img_resolution=64, model_channels=96, channel_mult=(1, 2), s_branch=True)
        build_network(network_preset("cifar10-ddpmpp"), label_dim=10, s_branch=False)

    Args:
        config: architecture and sizes; by default ``NetworkConfig()``.
        s_branch: True for a CTM, False for an EDM denoiser.
        sizes: fields of :class:`NetworkConfig`, in place of those of ``config``.

    Raises ValueError for an architecture that is not one of ``ARCHITECTURES`` or sizes that do not fit together,
    TypeError for a field that there is not.
    """
    return UNet(replace(config or NetworkConfig(), **sizes), s_branch=s_branch)


class Weightless(TorchFunctionMode):
    """A context in which networks are built with weights on the meta device: without memory, and nothing is drawn.

    What follows from the sizes alone, such as tables of frequencies, is made as ever. ``load_state_dict(...,
    assign=True)`` gives such a network its weights.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:  # what layers make their weights of
            kwargs = {**kwargs, "device": "meta"}
        elif getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_as(weight: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """Memory for a ``weight`` of :class:`Weightless`, in its dtype and strides. (``empty_like`` would import sympy.)"""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
