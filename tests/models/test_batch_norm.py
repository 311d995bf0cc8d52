"""Batch norm over ranks: two gloo processes with halves of a batch agree with one process and the whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctm_fast.models.batch_norm import SyncBatchNorm2d

RANKS = 2
SIZES = (3, 5)


def batch() -> Tensor:
    """[8, 4, 6, 6] float64, the channels far from zero."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, 6, 6, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4]).view(
        4, 1, 1
    ) + torch.tensor([0.0, 10, -20, 30]).view(4, 1, 1)


def layer(cls: type[torch.nn.BatchNorm2d]) -> torch.nn.BatchNorm2d:
    norm = cls(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.5, -1, 2]))
        norm.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    return norm


def steps(norm: torch.nn.BatchNorm2d, x: Tensor) -> dict[str, Tensor]:
    """Two passes; of the last, the output and the gradients of a sum, once and through a penalty on the first."""
    norm(x)
    x = x.clone().requires_grad_()
    y = norm(x)
    weight = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    loss = (y.square() * weight).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    assert norm.running_mean is not None and norm.running_var is not None
    parts = {"y": y, "grad": grad, "penalty": x.grad, "weight": norm.weight.grad, "mean": norm.running_mean}
    return {name: tensor.detach() for name, tensor in {**parts, "var": norm.running_var}.items()}


def rank(index: int, directory: str) -> None:
    """A process: its share of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=index, world_size=RANKS)
    try:
        share = batch().split(SIZES)[index]
        torch.save(steps(layer(SyncBatchNorm2d), share), f"{directory}/{index}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return steps(layer(torch.nn.BatchNorm2d), batch())


def test_two_ranks_are_one(expected: dict[str, Tensor], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=RANKS)
    shares = [torch.load(tmp_path / f"{index}.pt") for index in range(RANKS)]
    for name in ("y", "grad", "penalty"):
        torch.testing.assert_close(torch.cat([share[name] for share in shares]), expected[name], rtol=1e-9, atol=1e-9)
    for name in ("mean", "var"):
        for share in shares:
            torch.testing.assert_close(share[name], expected[name], rtol=1e-9, atol=1e-9)
    summed = shares[0]["weight"] + shares[1]["weight"]
    torch.testing.assert_close(summed, expected["weight"], rtol=1e-9, atol=1e-9)


def test_alone_it_is_batch_norm(expected: dict[str, Tensor]) -> None:
    for name, tensor in steps(layer(SyncBatchNorm2d), batch()).items():
        assert torch.equal(tensor, expected[name]), name


def void_rank(index: int, directory: str) -> None:
    """A process: a batch that is not finite on one rank, then a good one."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=index, world_size=RANKS)
    try:
        norm, share = layer(SyncBatchNorm2d), batch().split(SIZES)[index]
        bad = share.clone()
        bad[0, 0, 0, 0] = float("nan") if index else 1.0
        norm(bad)
        assert norm.running_mean is not None and norm.running_var is not None
        torch.save({"mean": norm.running_mean, "var": norm.running_var, "y": norm(share)}, f"{directory}/{index}.pt")
    finally:
        dist.destroy_process_group()


def test_a_void_step_leaves_the_next_one_alone(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(void_rank, (str(tmp_path),), nprocs=RANKS)
    expected = layer(torch.nn.BatchNorm2d)
    y = expected(batch())
    shares = [torch.load(tmp_path / f"{index}.pt") for index in range(RANKS)]
    torch.testing.assert_close(torch.cat([share["y"] for share in shares]), y, rtol=1e-9, atol=1e-9)
    for share in shares:
        torch.testing.assert_close(share["mean"], expected.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(share["var"], expected.running_var, rtol=1e-9, atol=1e-9)
