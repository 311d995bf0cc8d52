"""The network computes in channels_last throughout: no image changes its memory format on the way."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctm_fast.models import NetworkConfig, build_network

COPIES = (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class _Recorder(TorchDispatchMode):
    """Notes the convolutions, and the copies of images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: list[tuple[Any, Any]] = []
        self.copies: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.convolutions.append(args[:2])
        elif func in COPIES and args[0].dim() == 4:
            self.copies.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_no_image_changes_its_memory_format() -> None:
    net = build_network(NetworkConfig(model_channels=16, num_blocks=1), s_branch=True).eval()
    x, t = torch.randn(2, 3, 32, 32), torch.ones(2)
    with torch.no_grad(), _Recorder() as noted:
        net(x, t, t)
    assert len(noted.convolutions) > 20
    for image, weight in noted.convolutions:
        for tensor in (image, weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last), (tensor.shape, tensor.stride())
    assert noted.copies == [x.shape], "more than the one change of format, of the input"
