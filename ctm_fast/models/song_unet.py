"""DDPM++: the U-Net of Song et al. (arXiv 2011.13456) as EDM and CTM use it."""

import torch
from torch import Tensor, nn

from ctm_fast.nn import Conv2d, GroupNorm, LevelEmbedding, UNetBlock
from ctm_fast.nn.conv import Resample


class SongUNet(nn.Module):
    """F_theta(x; t, s): the raw network between the preconditioning's input and output.

    Args:
        img_resolution, img_channels: of the square images.
        label_dim: number of classes; 0 for an unconditional network.
        model_channels: channels of the first convolution; ``channel_mult`` multiplies it per level.
        num_blocks: residual blocks per level of the encoder (the decoder has one more).
        attn_resolutions: the levels whose blocks attend; the decoder's first block always does.
        dropout: of the activations before each second convolution.
        head_channels: channels of an attention head; 0 for one head.
        s_branch: whether it takes a second noise level s (a CTM student does, an EDM teacher does not).

    ``forward(x, t, s=None, labels=None)``: x [B, img_channels, H, W] in any float dtype, which is also that of the
    result; t, s [B] float32; labels [B] class indices or [B, label_dim] one-hot. Computes in channels_last.

    ``forward`` is ``tail(*body(...))``. The tail holds both layers W that the published code takes adaptive weights
    at: the last block's second convolution and the output convolution.
    """

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.13,
        head_channels: int = 0,
        s_branch: bool = False,
    ) -> None:
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"img_resolution: expected a multiple of {2 ** (len(channel_mult) - 1)} "
                f"for {len(channel_mult)} levels, got {img_resolution}"
            )
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.s_branch = s_branch
        emb_channels = 4 * model_channels

        def block(
            in_channels: int, out_channels: int, attention: bool = False, resample: Resample | None = None
        ) -> UNetBlock:
            if attention and head_channels and out_channels % head_channels:
                raise ValueError(f"head_channels: expected a divisor of {out_channels} channels, got {head_channels}")
            return UNetBlock(
                in_channels,
                out_channels,
                emb_channels,
                s_branch=s_branch,
                resample=resample,
                attention=attention,
                heads=out_channels // head_channels if attention and head_channels else 1,
                dropout=dropout,
            )

        self.embedding = LevelEmbedding(model_channels, emb_channels, label_dim=label_dim, s_branch=s_branch)
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        channels = model_channels
        skips = []
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv2d(img_channels, channels, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(channels, channels, resample="down")
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{size}x{size}_block{index}"] = block(
                    channels, model_channels * mult, attention=size in attn_resolutions
                )
                channels = model_channels * mult
                skips.append(channels)
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(channels, channels)
            else:
                self.dec[f"{size}x{size}_up"] = block(channels, channels, resample="up")
            for index in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{index}"] = block(
                    channels + skips.pop(),
                    model_channels * mult,
                    attention=index == num_blocks and size in attn_resolutions,
                )
                channels = model_channels * mult
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, img_channels, 3, scale=1e-5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch leaves it out of its stubs

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.tail(*self.body(x, t, s, labels))

    def body(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything up to the last block's second convolution: its input and that block's skip path."""
        emb, emb_s = self.embedding(t, s, labels)
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb, emb_s) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in list(self.dec.items())[:-1]:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb, emb_s)
        return self.last_block.first(torch.cat([x, skips.pop()], dim=1), emb, emb_s)

    def tail(self, h: Tensor, skip: Tensor) -> Tensor:
        """F_x from what :meth:`body` returned."""
        x = self.last_block.second(h, skip)
        return self.out_conv(self.out_norm(x, silu=True))

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
