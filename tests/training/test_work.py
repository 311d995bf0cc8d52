"""Forward passes are counted as they are made: against every operation that torch sees in a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ctm_fast.models import NetworkConfig
from ctm_fast.training.work import discriminator_passes, operations, student_passes
from tests.models.small import SMALL
from tests.training.test_ctm_options import BASE, BATCH, CHOICES, draw, steps

NETWORK = SMALL["ddpmpp"]
PASS = operations(NETWORK, s_branch=True)


class Operations(TorchDispatchMode):
    """Adds up what FlopCounterMode would, whose hooks autograd.grad does not bear."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_operations_of_a_network() -> None:
    """The published one's, 42.4 GFLOP for an image of 32x32."""
    config = NetworkConfig(arch="ddpmpp", img_resolution=32, label_dim=10, dropout=0.13)
    assert f"{operations(config, s_branch=True) / 1e9:.3g}" == "42.4"
    assert 0.99 < operations(config, s_branch=False) / operations(config, s_branch=True) < 1


@pytest.mark.parametrize(
    ("choice", "bucket", "pieces"),
    [*((choice, 1, 1) for choice in CHOICES), ("published", 2, 1), ("published", 1, 3), ("published", 2, 3)],
)
def test_an_update_of_the_student(choice: str, bucket: int, pieces: int) -> None:
    settings = replace(BASE, **CHOICES[choice])
    _, step = steps(settings)
    step.bucket = bucket
    parts = [draw(settings, 11, slice(i, i + BATCH // pieces)) for i in range(0, BATCH, BATCH // pieces)]
    with Operations() as counter:
        step.backward([(p, step.consistency_target(step.solve(p.x_t, p.way, p.labels), p)) for p in parts])
    told = student_passes(step, parts, adversarial=False) * PASS
    assert told == pytest.approx(counter.total, rel=0.05)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("fake", ["estimate", "jump"])
@pytest.mark.parametrize("choice", ["published", "outer student", "inner target-sg"])
def test_with_a_discriminator(choice: str, fake: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the discriminator itself costs is taken off."""
    settings = replace(BASE, **CHOICES[choice])
    _, step = steps(settings, adversarial=True, fake=fake)
    assert step.adversary is not None
    monkeypatch.setattr(step.adversary.loss, "generator", lambda images, *_, **__: images.square().flatten(1).mean(1))
    parts = [draw(settings, 11, slice(i, i + BATCH // pieces)) for i in range(0, BATCH, BATCH // pieces)]
    with Operations() as counter:
        targets = [(p, step.consistency_target(step.solve(p.x_t, p.way, p.labels), p)) for p in parts]
        step.backward(targets, adversarial=True)
    told = student_passes(step, parts, adversarial=True) * PASS
    assert told == pytest.approx(counter.total, rel=0.06)
    with Operations() as counter, torch.no_grad():
        for part in parts:
            step.fake(part)
    assert discriminator_passes(step, parts) * PASS == pytest.approx(counter.total, rel=0.02)
