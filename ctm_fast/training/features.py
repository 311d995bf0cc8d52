"""The frozen feature networks of the adversarial stage, by the names that ``gan.features`` gives them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctm_fast.data import ImageDataset
from ctm_fast.diffusion.images import to_float
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.models.discriminator import ProjectedDiscriminator
from ctm_fast.models.features import DeiT, EfficientNetLite0, FeatureNetwork, feature_shapes, freeze
from ctm_fast.models.features.network import resize
from ctm_fast.training.config import RunConfig

_MOST = 50_000  # images that the classifier of ``indomain`` is trained on
_NUMBERS = 2**28  # and their numbers, a GiB of them


class ClassifierMaps(nn.Module):
    """The maps behind each convolution of a small classifier, for RGB images [B, 3, H, W] in [-1, 1].

    Args:
        layers: convolutions and ReLUs in turn; what follows them is not used.
        size: what images are resized to first.
        channels: 1 where it was trained on grey images.
    """

    def __init__(self, layers: nn.Sequential, *, size: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Conv2d))
        self.size, self.channels = size, channels

    def forward(self, images: Tensor) -> list[Tensor]:
        h = resize(images[:, : self.channels], self.size)
        maps = []
        for layer in self.layers:
            h = layer(h).relu()
            maps.append(h)
        return maps


def feature_networks(config: RunConfig, dataset: ImageDataset, device: torch.device) -> list[FeatureNetwork]:
    """The networks of ``config.gan.features``; ConfigError or CheckpointError naming the extra or the file it lacks."""
    settings = config.gan
    networks: list[FeatureNetwork] = []
    for name in settings.features:
        if name == "efflite0":
            networks.append(EfficientNetLite0(size=settings.features_size).to(device))
        elif name == "deit":
            if not settings.deit:
                raise ConfigError("gan.deit: expected the file of DeiT's weights for gan.features deit, got none")
            networks.append(DeiT(settings.deit).to(device))
        elif name == "indomain":
            networks.append(_indomain(config, dataset, device))
        else:
            raise ConfigError(f"gan.features: expected the network {name} as an argument of train, got none")
    return networks


def check_features(config: RunConfig, networks: Sequence[FeatureNetwork], device: torch.device) -> None:
    """Raise ConfigError unless a discriminator can be made for the maps that ``networks`` give of the run's images."""
    try:
        shapes = [feature_shapes(network, config.network.img_resolution, device) for network in networks]
        ProjectedDiscriminator(shapes, seed=0, width=config.gan.discriminator_width)
    except ValueError as error:
        raise ConfigError(f"gan.features, at gan.features_size = {config.gan.features_size}: {error}") from error


def named(networks: Sequence[FeatureNetwork]) -> tuple[str, ...]:
    """What a user's own networks are called in a configuration: class and digest of the weights."""
    names = []
    for network in networks:
        digest = hashlib.sha256()
        if isinstance(network, nn.Module):
            for key, tensor in sorted(network.state_dict().items()):
                digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        names.append(f"user:{type(network).__name__}:{digest.hexdigest()[:12]}")
    return tuple(names)


def _indomain(config: RunConfig, dataset: ImageDataset, device: torch.device) -> FeatureNetwork:
    if dataset.labels is None:
        raise ConfigError("gan.features: expected labelled data for indomain, got none")
    chosen = torch.randperm(len(dataset.images), generator=torch.Generator().manual_seed(config.seed))
    most = min(_MOST, _NUMBERS // (dataset.images.shape[1] * config.gan.features_size**2))
    chosen = chosen[:most].to(dataset.images.device)
    images = resize(to_float(dataset.images[chosen]), config.gan.features_size).to(device)
    classifier, _ = train_classifier(
        images, dataset.labels[chosen].to(device), num_classes=dataset.num_classes, seed=config.seed
    )
    assert isinstance(classifier, nn.Sequential)
    maps = ClassifierMaps(classifier, size=config.gan.features_size, channels=images.shape[1])
    freeze(maps)
    return maps
