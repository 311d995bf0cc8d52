"""The projected discriminator: shapes and counts of the published one, seeds, what is trained, labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features.network import Shape
from ctm_fast.models.projector import RandomProjector

PYRAMID: list[Shape] = [(24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]
TOKENS: list[Shape] = [(768, 14, 14)] * 4
SMALL: list[Shape] = [(6, 16, 16), (10, 8, 8)]


def maps_of(shapes: list[Shape], batch: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def small(seed: int = 0, **options: int) -> ProjectedDiscriminator:
    return ProjectedDiscriminator([SMALL], seed=seed, width=8, **options)  # type: ignore[arg-type]


def test_the_published_shapes(generator: torch.Generator) -> None:
    discriminator = ProjectedDiscriminator([PYRAMID, TOKENS], seed=0)
    for branch in discriminator.branches:
        assert sum(parameter.numel() for parameter in branch.parameters()) == 10_331_328
        assert branch.projector.shapes == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14)]
    features = [maps_of(PYRAMID, 2, generator), maps_of(TOKENS, 2, generator)]
    for branch, maps in zip(discriminator.branches, features, strict=True):
        assert [tuple(m.shape[1:]) for m in branch.projector(maps)] == branch.projector.shapes
    logits = discriminator(features)
    assert logits.shape == (2, 128)
    assert torch.isfinite(logits).all()


def test_projector_in_the_order_of_the_paper(generator: torch.Generator) -> None:
    """The published way interpolates first and convolves four times the pixels."""
    torch.manual_seed(0)
    projector = RandomProjector(PYRAMID, width=64).double()
    maps = [feature.double() for feature in maps_of(PYRAMID, 1, generator)]
    lateral = [F.conv2d(m, conv.weight, conv.bias) for m, conv in zip(maps, projector.lateral, strict=True)]
    assert [x.shape[1] for x in lateral] == [64, 128, 256, 512]
    y: Tensor | float = 0.0
    for level in (3, 2, 1, 0):
        up = F.interpolate(y + lateral[level], scale_factor=2, mode="bilinear", align_corners=True)
        y = F.conv2d(up, projector.mix[level].weight, projector.mix[level].bias)
        torch.testing.assert_close(projector(maps)[level], y, rtol=1e-10, atol=1e-10)


def test_projector_of_tokens(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    projector = RandomProjector(TOKENS, width=64)
    maps = maps_of(TOKENS, 1, generator)
    sizes = [module(m).shape[1:] for module, m in zip(projector.reassemble, maps, strict=True)]
    assert sizes == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_default_initialisation() -> None:
    """Each weight is uniform within 1 / sqrt(fan in), as in a new nn.Conv2d."""
    torch.manual_seed(0)
    for conv in RandomProjector(PYRAMID, width=64).lateral:
        bound = conv.weight.shape[1] ** -0.5
        assert 0.98 * bound < conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_seed_is_all_it_depends_on() -> None:
    state = torch.get_rng_state()
    first, second, other = small(1), small(1), small(2)
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    differing = [
        name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])
    ]
    for part in ("projector.lateral.0.weight", "projector.mix.1.bias", "heads.0.blocks.0.conv.bias"):
        assert f"branches.0.{part}" in differing


def test_a_state_dict_keeps_the_projector(generator: torch.Generator) -> None:
    maps = [maps_of(SMALL, 3, generator)]
    first, second = small(1).eval(), small(2).eval()
    assert not torch.equal(first(maps), second(maps))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first(maps), second(maps))


def test_only_heads_are_trained(generator: torch.Generator) -> None:
    discriminator = small()
    discriminator.requires_grad_(False).requires_grad_(True)
    assert all(".heads." in name for name, _ in discriminator.named_parameters())
    maps = [feature.requires_grad_() for feature in maps_of(SMALL, 3, generator)]
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items() if ".projector." in name}
    optimizer = torch.optim.RAdam(discriminator.parameters(), lr=0.1)
    discriminator([maps]).sum().backward()
    optimizer.step()
    assert all(feature.grad is not None and feature.grad.abs().sum() > 0 for feature in maps)
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
    after = discriminator.state_dict()
    assert len(before) == 8
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_spectral_norms_are_one(generator: torch.Generator) -> None:
    """However large the weights grow: after some steps of the power iteration, to its accuracy."""
    discriminator = small(classes=5)
    maps, labels = [maps_of(SMALL, 3, generator)], torch.tensor([0, 1, 4])
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(30)
        for _ in range(100):
            discriminator(maps, labels)
    checked = 0
    for module in discriminator.eval().modules():
        if hasattr(module, "parametrizations"):
            sigma = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
            assert sigma.item() == pytest.approx(1, abs=0.02)
            checked += 1
    assert checked == 2 + 1 + 2 * 3  # DownBlocks of the finer and the coarser head, and three at each end


def test_labels(generator: torch.Generator) -> None:
    maps = [maps_of(SMALL, 3, generator)]
    conditional, blind = small(classes=5).eval(), small().eval()
    a, b = (conditional(maps, torch.tensor(labels)) for labels in ([0, 1, 2], [3, 1, 2]))
    assert (a[0] != b[0]).all()
    torch.testing.assert_close(a[1:], b[1:])
    assert torch.equal(blind(maps), blind(maps, torch.tensor([0, 1, 2])))
    for labels in (None, torch.zeros(3)):
        with pytest.raises(ValueError, match="labels: expected int64"):
            conditional(maps, labels)


def test_projection_is_an_inner_product(generator: torch.Generator) -> None:
    head = small(classes=5).eval().branches[0].heads[0]
    x, labels = torch.randn(3, 8, 32, 32, generator=generator), torch.tensor([4, 0, 2])
    h = head.blocks(x)
    embedded, phi = head.embed.weight[labels], head.phi(h)
    expected = head.logits(h)[:, 0] + (embedded[:, :, None, None] * phi).sum(1) / 8
    torch.testing.assert_close(head(x, labels), expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(8, 16, 16), (8, 7, 7)], "expected maps each half the size of the one before"),
        ([(7, 14, 14)] * 2, "expected maps each half the size of the one before"),
        ([(8, 7, 7)] * 2, "expected maps each half the size of the one before"),
        ([(8, 4, 4), (8, 2, 2)], "expected the coarsest map to have 4 pixels or more on each side, got 2 x 2"),
    ],
)
def test_shapes_that_do_not_fit(shapes: list[Shape], message: str) -> None:
    with pytest.raises(ValueError, match=f"features: {message}"):
        ProjectedDiscriminator([shapes], seed=0)
