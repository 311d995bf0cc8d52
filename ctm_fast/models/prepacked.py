"""A network whose convolutions have their weights in their kernel's layout once, and not anew in each call.

On a CPU, 3x3 convolutions in float32 by Winograd's filtering want transformed weights (:mod:`ctm_fast.ops.conv3x3`);
of all others PyTorch reorders the weights at every call, and lets oneDNN choose its kernel for weights as they are.
``torch.compile`` on top brings nothing, so nothing is compiled. Figures are in CONTRIBUTING ("Tried and dropped").
"""

import copy
import itertools

import torch
from torch import Tensor, nn

from ctm_fast.models.unet import UNet
from ctm_fast.nn import Conv2d
from ctm_fast.ops import conv3x3_pack, conv3x3_packed, packing_pays


def unsupported(dtype: torch.dtype) -> str | None:
    """Why convolutions in ``dtype`` cannot be packed on this machine's CPU, in words; None where they can."""
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return f"oneDNN has no fast {str(dtype).removeprefix('torch.')} on this CPU"


def prepack(net: UNet, dtype: torch.dtype) -> UNet:
    """``net`` for inference in ``dtype`` at any batch size, sharing all with ``net`` but its convolutions' weights."""
    packed = pack_winograd(net, dtype)
    for name, shape in _input_shapes(packed, dtype).items():
        conv = packed.get_submodule(name)
        assert isinstance(conv, Conv2d)
        packed.set_submodule(name, OneDNNConv2d(conv, shape, dtype))
    return packed.eval()


def pack_winograd(net: UNet, dtype: torch.dtype) -> UNet:
    """``net`` for passes on a CPU without gradients in ``dtype``, sharing all with ``net`` but what it packs.

    A gradient that is asked for raises NotImplementedError. Packed weights are four times as large.

    That is the 3x3 convolutions which Winograd's filtering serves; their weights become other ordinary tensors, which
    ``torch.compile`` takes.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(net.parameters(), net.buffers())}
    packed = copy.deepcopy(net, shared)
    for name, conv in net.named_modules():
        if conv is net.out_conv or not isinstance(conv, Conv2d) or conv.kernel_size != (3, 3):
            continue
        if packing_pays(conv.in_channels, conv.out_channels, dtype):
            packed.set_submodule(name, WinogradConv2d(conv))
    return packed


class WinogradConv2d(nn.Module):
    """A 3x3 :class:`ctm_fast.nn.Conv2d` in float32 without gradients; ``conv`` is left as it is."""

    def __init__(self, conv: Conv2d) -> None:
        super().__init__()
        self.resampler = conv.resampler
        # Neither is a parameter: the order of the packed weights is the kernel's own, and is not to be saved.
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._weight = conv3x3_pack(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.resampler is not None:
            x = self.resampler(x)
        return conv3x3_packed(x, self._weight, self._bias)


class OneDNNConv2d(nn.Module):
    """:class:`ctm_fast.nn.Conv2d` without gradients, for inputs of one dtype.

    Args:
        conv: gives weights, bias and resampling; it is left as it is.
        shape: of the input after resampling, [B, C, H, W], for which the layout is chosen. Another shape is computed as
            well, if perhaps not as fast.
        dtype: of the inputs.
    """

    def __init__(self, conv: Conv2d, shape: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.resampler = conv.resampler
        self.padding = list(conv.padding)
        self._ones = [1, 1]
        # Neither is a parameter: memory in oneDNN's layout can be neither copied nor saved.
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach().to(dtype), self.padding, self._ones, self._ones, 1, shape
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.resampler is not None:
            x = self.resampler(x)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, self.padding, self._ones, self._ones, 1, "none", [], ""
        )


@torch.no_grad()
def _input_shapes(net: UNet, dtype: torch.dtype) -> dict[str, list[int]]:
    """Name of each :class:`Conv2d` -> the shape it convolves, for one image."""
    shapes: dict[str, list[int]] = {}
    names = {module: name for name, module in net.named_modules() if isinstance(module, Conv2d)}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[names[module]] = [1, inputs[0].shape[1], *output.shape[2:]]  # type: ignore[index]

    hooks = [module.register_forward_hook(note) for module in names]
    size = (1, net.img_channels, net.img_resolution, net.img_resolution)
    level = torch.ones(1)
    labels = torch.zeros(1, net.label_dim) if net.label_dim else None
    net(torch.zeros(size, dtype=dtype), level, level if net.s_branch else None, labels)
    for hook in hooks:
        hook.remove()
    return shapes
