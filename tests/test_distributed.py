"""Ranks: their shares, the mean of their gradients, and that they notice when they are not one job."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ctm_fast import distributed, evaluate, runtime, train
from ctm_fast.distributed import Ranks, agree, all_mean, all_sum, average_gradients, of_first, start_ranks, wait_for_all
from ctm_fast.errors import ConfigError
from tests.ranks import in_ranks

SIZE = 3
SHAPES = [(5, 7), (4, 3, 3, 3), (), (11,), (2, 2)]
CONFIG = {"seed": 0, "ctm": {"lr": 4e-4, "batch": 64}, "stages": ["teacher", "ctm"]}


def gradients(rank: int) -> list[Tensor]:
    """Of one rank, as ``SHAPES``: the convolution's in channels_last, the last one float64."""
    generator = torch.Generator().manual_seed(100 + rank)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    found[1] = found[1].contiguous(memory_format=torch.channels_last)
    found[-1] = found[-1].double()
    return found


def error_of(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (ConfigError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def talk(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """All that ranks do with one another, errors in between: after each, they must still understand one another."""
    told: dict[str, Any] = {}
    distributed._BUCKET = 100  # bytes: each bucket is full after one or two of the gradients
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients(0)]
    idle = nn.Parameter(torch.zeros(3))
    for parameter, gradient in zip(parameters, gradients(ranks.rank), strict=True):
        parameter.grad = gradient
    extra = torch.full((2,), float(ranks.rank))
    average_gradients([*parameters, idle], extra=[extra])
    assert idle.grad is None
    assert parameters[1].grad is not None and parameters[1].grad.is_contiguous(memory_format=torch.channels_last)
    told["gradients"] = [parameter.grad for parameter in parameters]
    told["extra"] = extra

    if ranks.rank == 1:
        parameters[3].grad = None
    told["missing"] = error_of(average_gradients, parameters)

    figures = torch.tensor([0.1, 1e8]) * (ranks.rank + 1)
    told["sum"], told["mean"], told["figures"] = all_sum(figures), all_mean(figures), figures

    agree("config", CONFIG)
    told["key"] = error_of(agree, "config", {**CONFIG, "ctm": {"lr": 1e-3 if ranks.rank == 2 else 4e-4, "batch": 64}})
    told["type"] = error_of(agree, "config", {"steps": 1.0 if ranks.rank else 1})
    told["absent"] = error_of(agree, "config", {"a": 1} if ranks.rank == 1 else {"a": 1, "b": [2, 3]})
    told["word"] = error_of(agree, "data", "é" * 300 + str(ranks.rank))
    told["order"] = error_of(agree, "config", dict(sorted(CONFIG.items(), reverse=ranks.rank == 1)))
    told["first"] = of_first({"step": 10 * ranks.rank, "name": "é"})
    told["empty"] = of_first("" if ranks.is_first else None)
    wait_for_all()
    return told


def test_three_ranks(tmp_path: Path) -> None:
    told = in_ranks(talk, SIZE, tmp_path)
    for index, each in enumerate(zip(*(gradients(rank) for rank in range(SIZE)), strict=True)):
        expected = torch.stack([gradient.double() for gradient in each]).mean(0)
        for rank in told:
            torch.testing.assert_close(rank["gradients"][index].double(), expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(rank["gradients"][index], told[0]["gradients"][index])
    figures = torch.stack([rank["figures"] for rank in told]).double()
    for rank in told:
        assert rank["extra"].tolist() == [1.0, 1.0]
        assert "got number 3 with one on 2" in rank["missing"]
        assert torch.equal(rank["sum"], figures.sum(0))
        assert torch.equal(rank["mean"], figures.sum(0) / SIZE)
        assert rank["key"] == (
            "ConfigError: config: expected the same on every rank, got ctm.lr = 0.001 on rank 2, 0.0004 on rank 0"
        )
        assert rank["type"].endswith("got steps = 1.0 on rank 1, 1 on rank 0")
        assert rank["absent"].endswith("got b = null on rank 1, [2, 3] on rank 0")
        assert rank["word"].startswith('ConfigError: data: expected the same on every rank, got "')
        assert len(rank["word"]) < 600
        assert rank["order"] == ""
        assert rank["first"] == {"step": 0, "name": "é"}
        assert rank["empty"] == ""


@given(size=st.integers(1, 16), each=st.integers(1, 64))
def test_shares_are_the_batch(size: int, each: int) -> None:
    shares = [Ranks(rank, size).share(size * each) for rank in range(size)]
    assert [index for share in shares for index in range(share.start, share.stop)] == list(range(size * each))
    assert len({share.stop - share.start for share in shares}) == 1


@pytest.mark.parametrize("batch", [0, 3, 5])
def test_a_batch_that_ranks_cannot_share(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"batch: expected a multiple of the 4 ranks, got {batch}"):
        Ranks(0, 4).share(batch)


def test_alone_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_ranks("cpu") == (Ranks(), torch.device("cpu"))
    assert not dist.is_initialized()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = gradient = torch.ones(2)
    average_gradients([parameter])
    assert parameter.grad is gradient and gradient.tolist() == [1, 1]
    agree("config", {"a": 1})
    wait_for_all()
    assert of_first([1]) == [1]
    assert all_mean(torch.tensor([1, 3])).tolist() == [1.0, 3.0]
    distributed.finish()


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "RANK: expected the number that torchrun sets .* got ''"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "cpu", "WORLD_SIZE: .* got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "cuda:0", "--device: .* local rank n takes cuda:n, got"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "cuda", "--nproc-per-node: expected at most 1.* got 2"),
    ],
)
def test_ranks_that_cannot_start(
    variables: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "find_device", torch.device)  # as on a machine with a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=message):
        start_ranks(device)
    assert not dist.is_initialized()


class _StartedError(Exception):
    pass


@pytest.mark.parametrize(
    ("command", "arguments"), [(train, []), (evaluate, ["--samples", "digits", "--reference", "digits"])]
)
def test_a_command_opens_no_device_before_its_rank_has_one(
    command: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or every rank would hold memory of the first GPU."""
    opened: list[str | None] = []

    def start(device: str | None) -> None:
        assert opened == []
        raise _StartedError

    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(runtime, "find_device", opened.append)
    monkeypatch.setattr(command, "start_ranks", start)
    precision = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(_StartedError):
            command.main()
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_rank_takes_its_gpu_before_it_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(distributed, "find_device", lambda device: calls.append(device) or torch.device("cuda"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    assert start_ranks(None) == (Ranks(3, 4, 1), torch.device("cuda:1"))
    assert calls == [1, None, "cpu:gloo,cuda:nccl"]
