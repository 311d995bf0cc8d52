"""3x3 convolution in plain PyTorch: PyTorch's own, and Winograd's with weights that were transformed beforehand."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

TILE, PANEL, STRIP = 4, 64, 16
_A, _B = 0.625, 1.5
_POINTS = (0.0, _A, -_A, _B, -_B)


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """A^T [4, 6], G [6, 3] and B^T [6, 6] of F(4x4, 3x3) at 0, +-5/8, +-3/2 and infinity, float64."""
    points = torch.tensor(_POINTS, dtype=torch.float64, device="cpu")
    powers = points[:, None] ** torch.arange(TILE, device="cpu")
    differences = points[:, None] - points + torch.eye(5, device="cpu")
    G = torch.cat([powers[:, :3] / differences.prod(1, keepdim=True), torch.tensor([[0.0, 0.0, 1.0]], device="cpu")])
    A_T = torch.cat([powers.T, torch.tensor([[0.0], [0.0], [0.0], [1.0]], device="cpu")], 1)
    B_T = torch.zeros(6, 6, dtype=torch.float64, device="cpu")
    for row in range(6):
        roots = [point for other, point in enumerate(_POINTS) if other != row]
        coefficients = torch.ones(1, dtype=torch.float64, device="cpu")
        for root in roots:  # times (x - root), the lowest power first
            coefficients = functional.pad(coefficients, (1, 0)) - root * functional.pad(coefficients, (0, 1))
        B_T[row, : len(coefficients)] = coefficients
    return A_T, G, B_T


_A_T, _G, _B_T = _matrices()


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.conv2d(x, weight, bias, padding=1)


def conv3x3_pack(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    G = _G.to(weight.device)
    transformed = torch.einsum("ia,kcab,jb->ijck", G, weight.double(), G).float().reshape(36, inputs, outputs)
    panels = (panel.unflatten(2, (-1, STRIP)).transpose(1, 2) for panel in transformed.split(PANEL, 2))
    return torch.cat([panel.flatten() for panel in panels]).view(36, inputs, outputs)


def conv3x3_packed(x: Tensor, packed: Tensor, bias: Tensor | None, lanes: int) -> Tensor:
    batch, inputs, height, width = x.shape
    outputs = packed.shape[2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    A_T, B_T = _A_T.to(x), _B_T.to(x)
    panels = packed.flatten().split([36 * inputs * min(PANEL, outputs - k) for k in range(0, outputs, PANEL)])
    strips = (panel.view(6, 6, -1, inputs, STRIP).transpose(2, 3) for panel in panels)
    weight = torch.cat([strip.flatten(3) for strip in strips], 3)
    padded = functional.pad(x, (1, TILE * columns - width + 1, 1, TILE * rows - height + 1))
    tiles = padded.unfold(2, 6, TILE).unfold(3, 6, TILE)  # [B, C, rows, columns, 6, 6]
    v = torch.einsum("ia,bcyxad,jd->ijbyxc", B_T, tiles, B_T)
    m = torch.einsum("ijbyxc,ijck->ijbyxk", v, weight)
    y = torch.einsum("ia,adbyxk,jd->byixjk", A_T, m, A_T).reshape(batch, TILE * rows, TILE * columns, outputs)
    y = y[:, :height, :width] if bias is None else y[:, :height, :width] + bias
    return y.contiguous().permute(0, 3, 1, 2)


def conv3x3_weight_grad(grad: Tensor, x: Tensor, lanes: int) -> Tensor:
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return conv2d_weight(x, shape, grad, padding=1).contiguous(memory_format=torch.channels_last)
