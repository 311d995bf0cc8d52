"""The full-size published networks, on the meta device: names, shapes, parameters and operations."""

import json

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ctm_fast.models import (
    CTM,
    EDMDenoiser,
    NetworkConfig,
    build_network,
    describe,
    from_published,
    network_preset,
    student_from_teacher,
    to_published,
)
from tests.golden import DIRECTORY

# File of names -> preset, what differs from it, and whether it is a student.
LISTS: dict[str, tuple[str, dict[str, int], bool]] = {
    "ctm_cifar10_uncond": ("cifar10-ddpmpp", {}, True),
    "ctm_cifar10_cond": ("cifar10-ddpmpp", {"label_dim": 10}, True),
    "ctm_imagenet64": ("imagenet64-adm", {}, True),
    "edm_cifar10_uncond_vp": ("cifar10-ddpmpp", {"augment_dim": 9}, False),
    "edm_cifar10_cond_vp": ("cifar10-ddpmpp", {"augment_dim": 9, "label_dim": 10}, False),
    "edm_cifar10_uncond_ve": ("cifar10-ncsnpp", {"augment_dim": 9}, False),
    "edm_cifar10_cond_ve": ("cifar10-ncsnpp", {"augment_dim": 9, "label_dim": 10}, False),
    "edm_imagenet64_cond_adm": ("imagenet64-dhariwal", {}, False),
    "openai_edm_imagenet64": ("imagenet64-adm", {}, False),
}


def published(name: str) -> dict[str, Tensor]:
    """The list ``name`` as tensors without memory."""
    shapes = json.loads((DIRECTORY / "keys" / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def config(name: str) -> tuple[NetworkConfig, bool]:
    preset, sizes, student = LISTS[name]
    return NetworkConfig(**{**vars(network_preset(preset)), **sizes}), student


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def test_all_lists_are_here() -> None:
    assert {path.stem for path in (DIRECTORY / "keys").iterdir()} == set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_what_is_inferred(name: str) -> None:
    """From names and shapes alone: the published configuration, and nothing that could be read is assumed."""
    network, student = config(name)
    described = describe(published(name))
    assert described.network == network
    assert described.s_branch == student
    assert described.sigma_data == 0.5
    guided = {"img_resolution"} if network.arch == "adm" else set()
    assert set(described.assumed) == {"dropout", "head_channels", "label_dropout", "sigma_data"} | guided
    assert network.arch in str(described)
    assert "assumed: " in str(described)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", LISTS)
def test_import_and_export(name: str, told: bool) -> None:
    tensors = published(name)
    network, student = config(name)
    model = from_published(tensors, network if told else None)
    assert type(model) is (CTM if student else EDMDenoiser)
    assert model.net.config == network
    assert shapes(to_published(model)) == shapes(tensors)


@pytest.mark.parametrize("name", LISTS)
def test_a_network_that_we_build_is_the_published_one(name: str) -> None:
    network, student = config(name)
    with torch.device("meta"):
        net = build_network(network, s_branch=student)
    assert shapes(to_published((CTM if student else EDMDenoiser)(net))) == shapes(published(name))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("edm_cifar10_uncond_vp", "ctm_cifar10_uncond"),
        ("edm_cifar10_cond_vp", "ctm_cifar10_cond"),
        ("openai_edm_imagenet64", "ctm_imagenet64"),
    ],
)
def test_a_published_teacher_becomes_the_published_student(teacher: str, student: str) -> None:
    model = from_published(published(teacher))
    assert isinstance(model, EDMDenoiser)
    with torch.device("meta"):
        made = student_from_teacher(model)
    assert shapes(to_published(made)) == shapes(published(student))


@pytest.mark.parametrize(
    ("preset", "sizes", "s_branch", "count"),
    [
        ("cifar10-ddpmpp", {}, True, 60_395_267),
        ("cifar10-ddpmpp", {"label_dim": 10}, True, 60_396_675),
        ("imagenet64-adm", {}, True, 324_100_611),
        ("cifar10-ddpmpp", {}, False, 55_732_739),
        ("cifar10-ddpmpp", {"label_dim": 10}, False, 55_734_147),
        ("imagenet64-adm", {}, False, 295_899_267),
        ("imagenet64-dhariwal", {}, False, 295_899_267),
    ],
)
def test_parameters(preset: str, sizes: dict[str, int], s_branch: bool, count: int) -> None:
    with torch.device("meta"):
        net = build_network(network_preset(preset), s_branch=s_branch, **sizes)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(
    ("preset", "gflop"), [("cifar10-ddpmpp", 42.4), ("imagenet64-adm", 219), ("imagenet64-dhariwal", 219)]
)
def test_operations_of_an_image(preset: str, gflop: float) -> None:
    """As torch counts them, at batch 1 and, times 3, at batch 3."""
    config = network_preset(preset)
    for batch in (1, 3):
        with torch.device("meta"):
            net = build_network(config, s_branch=True)
            x = torch.empty(batch, 3, config.img_resolution, config.img_resolution)
            t = torch.empty(batch)
            labels = torch.empty(batch, config.label_dim) if config.label_dim else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x, t, t, labels)
        counted = counter.get_total_flops() / batch / 1e9
        assert f"{counted:.3g}" == f"{gflop:.3g}"
