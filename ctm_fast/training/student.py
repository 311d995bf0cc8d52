"""Where the networks of the student's stages come from."""

from dataclasses import replace
from pathlib import Path

import torch

from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, build_network, load_model, student_from_teacher
from ctm_fast.training.config import RunConfig


def load_teacher(path: Path, config: RunConfig) -> EDMDenoiser:
    """The EDM model in ``path``; CheckpointError unless it is one and fits ``config``."""
    model, network = _load(path)
    if not isinstance(model, EDMDenoiser):
        raise CheckpointError(f"{path}: expected an EDM teacher, got a CTM")
    _fit(path, "teacher", model, network, config)
    return model


def load_student(path: Path, config: RunConfig) -> CTM:
    """The CTM in ``path``; CheckpointError unless it is one and fits ``config``."""
    model, network = _load(path)
    if not isinstance(model, CTM):
        raise CheckpointError(f"{path}: expected a CTM, got an EDM teacher")
    _fit(path, "CTM", model, network, config)
    return model


def fresh_student(config: RunConfig, stage: str, teacher: EDMDenoiser | None) -> CTM:
    """A student with its teacher's weights; without a teacher, with random ones of the stage's seed."""
    torch.manual_seed(config.stage_seed(stage))
    settings = config.of_student(stage)
    if teacher is not None:
        return student_from_teacher(teacher, s_init=settings.s_init)
    net = build_network(config.network, s_branch=True)
    if settings.s_init == "published":
        net.draw_s_branch()
    return CTM(net, config.sigma_data)


def _load(path: Path) -> tuple[CTM | EDMDenoiser, NetworkConfig]:
    model, metadata = load_model(path)
    return model, metadata["network"]


def _fit(path: Path, kind: str, model: CTM | EDMDenoiser, network: NetworkConfig, config: RunConfig) -> None:
    """Give ``model`` the dropout of ``config``; CheckpointError unless all else is as configured."""
    network = replace(network, dropout=config.network.dropout, label_dropout=config.network.label_dropout)
    # A published teacher has an input for augmentations, which no student takes over.
    got = {**vars(network), "augment_dim": 0, "sigma_data": model.sigma_data}
    for key, value in {**vars(config.network), "sigma_data": config.sigma_data}.items():
        if got[key] != value:
            raise CheckpointError(f"{path}: expected a {kind} of {key} = {value} as configured, got {got[key]}")
    weights = model.net.state_dict()
    model.net = build_network(network, s_branch=isinstance(model, CTM))
    model.net.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
