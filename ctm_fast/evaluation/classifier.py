"""A small classifier trained on the real images: it says whether samples are of the class they were asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 0.2  # of the images
BATCH = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
WIDTHS = (32, 64, 64)


def train_classifier(
    images: Tensor, labels: Tensor, *, num_classes: int, seed: int, steps: int = 1000
) -> tuple[nn.Module, float]:
    """Train a three-layer convolutional network on 80 % of the images and test it on the others.

    AdamW, one-cycle learning rate, every image moved by up to one pixel. Equal arguments give equal weights on a CPU;
    the global random state is left alone.

    Args:
        images: [n, C, H, W] float32 in [-1, 1], n at least 2; H and W at least 4.
        labels: [n] int64 in 0..num_classes-1.
        seed: of the split, the initial weights, the order and the shifts.

    Returns:
        The module, images -> logits [n, num_classes], in eval mode on the images' device, and its accuracy in [0, 1]
        on the images held out. Report both seed and accuracy beside whatever is measured with it.

    Raises:
        TypeError: images that are not float32 or labels that are not int64, ValueError: their shapes.
    """
    _check(images, labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held_out = max(1, round(HELD_OUT * len(images)))
    test, train = order[:held_out], order[held_out:]
    module = _network(images.shape[1:], num_classes, seed).to(images.device)
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with torch.enable_grad():
        for _ in range(steps):
            batch = train[torch.randint(len(train), (BATCH,), generator=generator).to(train.device)]
            loss = F.cross_entropy(module(_shift(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval().requires_grad_(False)
    return module, accuracy(module, images[test], labels[test])


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 1024) -> float:
    """Share in [0, 1] of images [n, C, H, W] whose largest logit is that of their label [n]; n at least 1.

    Raises TypeError and ValueError as :func:`train_classifier` does.
    """
    _check(images, labels)
    right = 0
    for start in range(0, len(images), batch_size):
        chunk = slice(start, start + batch_size)
        right += int((module(images[chunk]).argmax(1) == labels[chunk]).sum())
    return right / len(images)


def _network(shape: torch.Size, num_classes: int, seed: int) -> nn.Module:
    channels, height, width = shape
    features = WIDTHS[-1] * -(-height // 4) * -(-width // 4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        return nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTHS[0], WIDTHS[1], 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(WIDTHS[1], WIDTHS[2], 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(features, num_classes),
        )


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by -1, 0 or 1 pixel in either direction, the border repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dy, dx = torch.randint(3, (2, n), generator=generator).to(images.device)
    rows = dy[:, None] + torch.arange(height, device=images.device)
    columns = dx[:, None] + torch.arange(width, device=images.device)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _check(images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.float32:
        raise TypeError(f"images: expected torch.float32, got {images.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(f"images: expected [n, C, H, W] with n at least 1, got {list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected [{len(images)}], got {list(labels.shape)}")
