"""Labels that are dropped in training: for teacher, student and target alike."""

import pytest
import torch
from torch import Tensor

from ctm_fast.data import load_dataset
from ctm_fast.models import EDMDenoiser, UNet, build_network
from ctm_fast.training import override, preset
from ctm_fast.training.ctm_stage import CTMStage, distance_of
from ctm_fast.training.execution import Execution
from ctm_fast.training.regions import Regions
from ctm_fast.training.student import fresh_student
from tests.training.test_ctm_options import CPU

TINY = ("network.model_channels=8", "network.channel_mult=1", "network.label_dropout=0.5", "ctm.batch=16")


def test_a_sample_has_its_label_in_all_networks_or_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(preset("digits"), [*TINY, "ctm.k_strategy=fixed", "ctm.max_solver_steps=1"])
    dataset = load_dataset("digits", resolution=8, channels=1, labels=True)
    teacher = EDMDenoiser(build_network(config.network, s_branch=False), config.sigma_data)
    student = fresh_student(config, "ctm", teacher)
    regions, distance = Regions(compile=False, device=CPU), distance_of(config.ctm, CPU)
    stage = CTMStage(config, dataset, Execution(CPU), regions, student, teacher, distance)
    embedded: list[Tensor] = []
    body = UNet.body

    def watched(net: UNet, x: Tensor, t: Tensor, s: Tensor | None, labels: Tensor | None, *rest: Tensor) -> Tensor:
        found = net.embedding._label(labels, t)
        assert found is not None
        embedded.append(found)
        return body(net, x, t, s, labels, *rest)  # type: ignore[return-value]

    monkeypatch.setattr(UNet, "body", watched)
    stage.step.body = stage.model.net.body
    stage.train_step(0)
    _, labels = stage.batches.at(0, slice(0, 16))
    assert labels is not None and 0 < labels.sum() < 16
    whole = [each for each in embedded if len(each) == 16]
    assert len(embedded) == 2 + 5 and len(whole) >= 2 + 2  # a Heun step; target twice, estimate twice, DSM
    assert all(torch.equal(each, labels) for each in whole)
    for part in embedded:
        assert all(any(torch.equal(row, other) for other in labels) for row in part)
