"""The adversarial loss: closed forms, where gradients go, and draws that no split of the batch changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.losses import AdversarialLoss
from ctm_fast.losses.gan import discriminator_hinge, generator_hinge, r1_penalty
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import EfficientNetLite0, FeatureNetwork, feature_shapes

RESOLUTION = 16


class Pyramid(nn.Module):
    """A user's feature network: two maps of an image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(self.norm(self.first(x)))
        return [h, torch.tanh(self.second(h))]


def adversary(classes: int = 0, networks: int = 1, **options: object) -> AdversarialLoss:
    features: list[FeatureNetwork] = [Pyramid() for _ in range(networks)]
    shapes = [feature_shapes(network, RESOLUTION) for network in features]
    discriminator = ProjectedDiscriminator(shapes, seed=3, width=8, classes=classes)
    return AdversarialLoss(features, discriminator, **options)  # type: ignore[arg-type]


def images(batch: int, generator: torch.Generator, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, RESOLUTION, RESOLUTION, generator=generator) * 2 - 1


def seeds(batch: int) -> Tensor:
    return torch.arange(batch) + (11 << 32)


def test_hinge() -> None:
    zero = torch.zeros(3, 64)
    assert torch.equal(discriminator_hinge(zero, zero), torch.full((3,), 2.0))
    assert torch.equal(generator_hinge(zero), torch.zeros(3))
    fake, real = torch.tensor([[-3.0, 1.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.5], [-1.0, 1.0]])
    assert discriminator_hinge(fake, real).tolist() == [1.25, 1.5]
    assert generator_hinge(fake).tolist() == [1.0, 0.5]


def test_two_at_zero_logits(generator: torch.Generator) -> None:
    adversarial = adversary(augment=True)
    for branch in adversarial.discriminator.branches:
        for head in branch.heads:
            head.logits = nn.Conv2d(head.logits.in_channels, 1, 4, bias=False)
            nn.init.zeros_(head.logits.weight)
    judged = adversarial.judge(images(4, generator), images(4, generator), None, seeds=seeds(4), step=0)
    assert torch.equal(judged.loss, torch.full((4,), 2.0))
    assert judged.accuracy().item() == 0


def test_accuracy() -> None:
    fake, real = torch.tensor([[-1.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    judged = adversary().judge(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), None, seeds=seeds(2), step=0)
    assert type(judged)(judged.loss, fake, real).accuracy().item() == 0.75


@pytest.mark.parametrize("channels", [1, 3])
def test_the_generators_gradient(channels: int, generator: torch.Generator) -> None:
    """To the images, also grey ones; not to heads or features; and the heads are as trainable as before."""
    adversarial = adversary()
    fake = images(4, generator, channels).requires_grad_()
    loss = adversarial.generator(fake, None, seeds=seeds(4), step=0)
    assert loss.shape == (4,)
    loss.mean().backward()
    assert fake.grad is not None and all(grad.abs().sum() > 0 for grad in fake.grad)
    assert isinstance(adversarial.features[0], nn.Module)
    for parameter in adversarial.features[0].parameters():
        assert not parameter.requires_grad and parameter.grad is None
    for parameter in adversarial.discriminator.parameters():
        assert parameter.requires_grad and parameter.grad is None


def test_the_discriminators_gradient(generator: torch.Generator) -> None:
    adversarial = adversary()
    fake, real = images(4, generator).requires_grad_(), images(4, generator).requires_grad_()
    judged = adversarial.judge(fake, real, None, seeds=seeds(4), step=0)
    assert not judged.fake.requires_grad and not judged.real.requires_grad
    judged.loss.mean().backward()
    assert fake.grad is None and real.grad is None
    for name, parameter in adversarial.discriminator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_one_loss_is_what_its_parts_say(generator: torch.Generator) -> None:
    """judge() against logits of each side; a forward pass more moves nothing but batch norm's running numbers."""
    adversarial = adversary(classes=4)
    labels = torch.tensor([0, 1, 2, 3])
    fake, real = images(4, generator), images(4, generator)
    adversarial.discriminator.eval()
    judged = adversarial.judge(fake, real, labels, seeds=seeds(4), step=2)
    sides = [adversarial.logits(x, labels, seeds=seeds(4), step=2, real=x is real) for x in (fake, real)]
    torch.testing.assert_close(judged.loss, discriminator_hinge(*sides))
    torch.testing.assert_close(adversarial.generator(fake, labels, seeds=seeds(4), step=2), generator_hinge(sides[0]))
    other = adversarial.generator(fake, labels.flip(0), seeds=seeds(4), step=2)
    assert (other != generator_hinge(sides[0])).all()


def test_no_split_of_the_batch_changes_the_draws(generator: torch.Generator) -> None:
    adversarial = adversary(networks=2)
    adversarial.discriminator.eval()  # batch norm apart
    fake, real = images(6, generator), images(6, generator)
    whole = adversarial.judge(fake, real, None, seeds=seeds(6), step=5).loss
    parts = [
        adversarial.judge(fake[part], real[part], None, seeds=seeds(6)[part], step=5).loss
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    again = adversarial.judge(fake, real, None, seeds=seeds(6), step=5).loss
    assert torch.equal(whole, again)
    assert (adversarial.judge(fake, real, None, seeds=seeds(6), step=6).loss != whole).all()
    assert (adversarial.judge(fake, real, None, seeds=seeds(6) + (1 << 32), step=5).loss != whole).all()


@pytest.mark.parametrize("same", [False, True])
def test_what_each_network_is_shown(same: bool, generator: torch.Generator) -> None:
    """Each sees draws of its own; real and generated images share them only if told."""
    adversarial = adversary(networks=2, same_augment=same)
    seen: list[Tensor] = []
    adversarial.features = tuple(
        lambda x, network=network: (seen.append(x), network(x))[1] for network in adversarial.features
    )
    picture = images(4, generator)
    adversarial.judge(picture, picture, None, seeds=seeds(4), step=0)
    fake_first, fake_second, real_first, real_second = seen
    assert not torch.equal(fake_first, fake_second)
    assert torch.equal(fake_first, real_first) == same
    assert torch.equal(fake_second, real_second) == same
    plain = adversary(augment=False)
    plain.features = tuple(adversarial.features[:1])
    seen.clear()
    plain.judge(picture, picture, None, seeds=seeds(4), step=0)
    assert torch.equal(seen[0], picture)


def test_r1_of_a_linear_function(generator: torch.Generator) -> None:
    x = images(3, generator).requires_grad_()
    weight = torch.randn(x[0].numel(), 5, generator=generator)
    penalty = r1_penalty(x.flatten(1) @ weight, x)
    torch.testing.assert_close(penalty, weight.mean(1).square().sum().expand(3) / 2)


def test_r1_reaches_the_heads(generator: torch.Generator) -> None:
    """Its gradient to a head against finite differences, in float64, with augmentation and batch norm in between."""
    adversarial, without = adversary(r1=2.0), adversary()
    for each in (adversarial, without):
        each.discriminator.double()
        assert isinstance(each.features[0], nn.Module)
        each.features[0].double()
    fake, real = images(3, generator).double(), images(3, generator).double()

    def judged(loss: AdversarialLoss) -> Tensor:
        return loss.judge(fake, real, None, seeds=seeds(3), step=1).loss

    def penalty() -> Tensor:
        x = real.clone().requires_grad_()
        return r1_penalty(without.logits(x, None, seeds=seeds(3), step=1, real=True), x)

    both, hinge = judged(adversarial), judged(without)
    for module in without.discriminator.modules():
        if isinstance(module, torch.nn.utils.parametrizations._SpectralNorm):
            module.eval()  # its vectors stand still; batch norm goes on as in training
    assert (penalty() > 0).all()
    torch.testing.assert_close(both, hinge + 2 * penalty(), check_dtype=False, rtol=1e-5, atol=1e-6)

    weight = without.discriminator.branches[0].heads[0].blocks[0].norm.weight
    direction = torch.randn(weight.shape, generator=generator).double()
    (gradient,) = torch.autograd.grad(penalty().sum(), weight)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        ends.append(penalty().sum().item())
        with torch.no_grad():
            weight -= sign * step * direction
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_heads_learn_to_tell(generator: torch.Generator) -> None:
    """Noise from smooth images: the loss falls below that of knowing nothing, and the signs become right."""
    adversarial = adversary()
    optimizer = torch.optim.Adam(adversarial.discriminator.parameters(), lr=0.01, betas=(0.5, 0.9))
    for step in range(40):
        fake, real = images(16, generator), F.avg_pool2d(images(16, generator), 3, 1, 1)
        judged = adversarial.judge(fake, real, None, seeds=seeds(16), step=step)
        optimizer.zero_grad()
        judged.loss.mean().backward()
        optimizer.step()
    assert judged.loss.mean() < 1
    assert judged.accuracy() > 0.8


def test_efficientnet(generator: torch.Generator) -> None:
    """The published pipeline with real weights: 64 logits of a 32x32 image, finite gradients."""
    network = EfficientNetLite0()
    discriminator = ProjectedDiscriminator([feature_shapes(network, 32)], seed=0)
    adversarial = AdversarialLoss([network], discriminator)
    fake = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1).requires_grad_()
    assert adversarial.logits(fake, None, seeds=seeds(2), step=0, real=True).shape == (2, 64)
    adversarial.generator(fake, None, seeds=seeds(2), step=0).mean().backward()
    assert fake.grad is not None and torch.isfinite(fake.grad).all() and fake.grad.abs().sum() > 0


def test_asking_for_shapes_teaches_nothing() -> None:
    network = Pyramid()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert feature_shapes(network, RESOLUTION) == [(6, 16, 16), (8, 8, 8)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_errors() -> None:
    with pytest.raises(ValueError, match="features: expected 1 networks, got 2"):
        AdversarialLoss([Pyramid(), Pyramid()], adversary().discriminator)
    with pytest.raises(ValueError, match="features: expected a list of feature maps, got Tensor"):
        feature_shapes(lambda x: x, 8)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"features: expected maps of shape \[B, C, H, W\], got \[1, 3, 64\]"):
        feature_shapes(lambda x: [x.flatten(2)], 8)
