"""Regions that share code, and a clock that nobody reads."""

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ctm_fast.training import regions
from ctm_fast.training.regions import Regions, Timer

CUDA = torch.device("cuda")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def jump(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    yield
    torch._dynamo.config.recompile_limit = limit


def test_sizes_of_several_networks_are_compiled_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives all methods of one class 8 graphs together, and ends the run at the ninth."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    made = Regions(compile=True, device=CUDA)
    student, target = Model(), Model().requires_grad_(False)
    jumps = [made.compile("student", student.jump), made.compile("target", target.jump)]
    for size in range(2, 8):
        x = torch.randn(size, 2)
        for jump, model in zip(jumps, (student, target), strict=True):
            with torch.no_grad():
                assert torch.equal(jump(x), model.jump(x))
            torch.testing.assert_close(jump(x.requires_grad_()), model.jump(x))


def test_nothing_compiled_leaves_the_limit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    Regions(compile=False, device=CUDA)
    assert torch._dynamo.config.recompile_limit == 8 < regions._GRAPHS


class Event:
    """A GPU that is a part of the way behind: an event is over when three more have been recorded."""

    recorded = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.time = Event.recorded
        Event.recorded += 1

    def query(self) -> bool:
        return Event.recorded > self.time + 3

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0 * (end.time - self.time)


def test_events_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer = Timer(CUDA)
    for _ in range(100):
        with timer("teacher"):
            pass
    assert len(timer._events) < 5
    assert timer.take() == {"teacher": 100.0}
    assert timer.take() == {}
