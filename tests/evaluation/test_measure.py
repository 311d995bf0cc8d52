"""All metrics at once: they are those of the features, whatever the batches, their order and the ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctm_fast.errors import ConfigError, DataError
from ctm_fast.evaluation.extractors import Extractor, Features
from ctm_fast.evaluation.frechet import frechet_distance
from ctm_fast.evaluation.kernel_distance import kernel_distance
from ctm_fast.evaluation.measure import Summary, compare, summarise, warnings
from ctm_fast.evaluation.moments import moments
from ctm_fast.evaluation.moments_file import StoredMoments
from ctm_fast.evaluation.neighbours import neighbours

N, M = 120, 90


def features(images: Tensor) -> Features:
    """Of images [b, 1, 3, 4]: pixels, sums of columns, two of them."""
    pixels = images.flatten(1).float() / 64
    return Features(pixels, images.float().sum((1, 2)), pixels[:, :2])


EXTRACTOR = Extractor("pixels", "ab", "none", features)


def pixels(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(200 - 60 * seed, (n, 1, 3, 4), generator=generator, dtype=torch.uint8)


REAL, MADE = pixels(N, 0), pixels(M, 1)


def summary(images: Tensor, size: int, order: Tensor, samples: int | None) -> Summary:
    batches = [(index, images[index]) for index in order.split(size)]
    return summarise(EXTRACTOR, batches, len(images), samples=samples)


def metrics(size: int, seed: int | None = None) -> dict[str, Any]:
    def order(n: int) -> Tensor:
        return torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    return compare(summary(MADE, size, order(M), None), summary(REAL, size, order(N), M), None)


def flat(found: dict[str, Any]) -> dict[str, float]:
    numbers = {}
    for metric, values in found.items():
        for name, value in values.items():
            inner = value if isinstance(value, dict) else {"": value}
            numbers |= {f"{metric} {name} {key}": number for key, number in inner.items()}
    return numbers


def test_they_are_those_of_the_features() -> None:
    found = metrics(7)
    real, made = (features(images).pooled for images in (REAL, MADE))
    assert found["frechet"]["value"] == pytest.approx(frechet_distance(*moments(made), *moments(real)), rel=1e-12)
    assert found["kid"]["value"] == kernel_distance(real, made).value
    assert found["neighbours"] | vars(neighbours(real, made)) == found["neighbours"]
    spatial = [features(images).spatial for images in (MADE, REAL)]
    assert spatial[0] is not None and spatial[1] is not None
    expected = frechet_distance(*moments(spatial[0]), *moments(spatial[1]))
    assert found["spatial-frechet"]["value"] == pytest.approx(expected, rel=1e-12)


def test_the_floor_is_of_parts_that_share_no_image() -> None:
    """Of 120 real images and 90 samples the parts are halves; of 120 and 30, as many as there are samples."""
    for samples, expected in ((M, 60), (30, 30)):
        made = summary(REAL, 7, torch.arange(N), samples)
        halves = made.halves
        assert halves is not None
        assert sorted([*halves.first.tolist(), *halves.rest.tolist()]) == list(range(N))
        rest, first = made.parts
        assert len(halves.first) == first.count == expected
        torch.testing.assert_close(first.mean, features(REAL[halves.first]).pooled.double().mean(0))
        torch.testing.assert_close(rest.mean, features(REAL[halves.rest]).pooled.double().mean(0))
    found = metrics(7)
    assert found["frechet"]["floor_count"] == 60
    assert 0 < found["frechet"]["floor"] < found["frechet"]["value"]
    assert abs(found["kid"]["floor"]) < 5 * found["kid"]["floor_standard_error"] < found["kid"]["value"]


def test_real_images_are_at_the_floor() -> None:
    """Real images that the reference has not: within a third of the floor of as many, which many images narrow."""
    real, held_out = (pixels(4000, 0)[i::2] for i in range(2))
    mine = summarise(EXTRACTOR, [(torch.arange(2000), held_out)], 2000, ("frechet",))
    other = summarise(EXTRACTOR, [(torch.arange(2000), real)], 2000, ("frechet",), samples=1000)
    found = compare(mine, other, None, ("frechet",))["frechet"]
    assert found["value"] < found["floor"] < 4 * found["value"]


@pytest.mark.parametrize(("size", "seed"), [(1, None), (90, None), (7, 0), (13, 1)])
def test_batches_and_order_change_nothing(size: int, seed: int | None) -> None:
    assert flat(metrics(size, seed)) == pytest.approx(flat(metrics(64)), rel=1e-9, abs=1e-12)


def rank(index: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=index, world_size=2)
    try:
        found = []
        for images, samples in ((MADE, None), (REAL, M)):
            mine = torch.arange(len(images)).split(16)[index::2]
            batches = [(members, images[members]) for members in mine]
            found.append(summarise(EXTRACTOR, batches, len(images), samples=samples))
        torch.save(flat(compare(*found, None)), f"{directory}/{index}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_change_nothing(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    for index in range(2):
        found = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert found == pytest.approx(flat(metrics(64)), rel=1e-9, abs=1e-12)


def test_precision_and_recall_are_not_swapped() -> None:
    """Samples of one grey value of two: precise, and half of the images are missed."""
    greys = torch.tensor([0, 200], dtype=torch.uint8)[torch.arange(N) % 2]
    real = (greys[:, None, None, None] + pixels(N, 0)[:, :, :1, :1] // 16).expand(N, 1, 3, 4)
    made = (pixels(M, 0)[:, :, 1:2, :1] // 16).expand(M, 1, 3, 4)
    found = compare(summary(made, 9, torch.arange(M), None), summary(real, 9, torch.arange(N), M), None)["neighbours"]
    assert found["precision"] > 0.8
    assert found["recall"] < 0.6


def test_stored_moments_take_the_place_of_images() -> None:
    made, real = summary(MADE, 9, torch.arange(M), None), summary(REAL, 9, torch.arange(N), M)
    stored = StoredMoments(Path("x"), "ab", real.moments.mean, real.moments.covariance(), None, None)
    found = compare(made, None, stored)
    assert found["frechet"] == {
        "value": pytest.approx(metrics(9)["frechet"]["value"]),
        "floor": None,
        "floor_count": None,
    }
    assert found["kid"] == "needs the images of the reference, which has only moments"
    assert found["spatial-frechet"] == "the reference has no spatial moments"
    assert found["inception-score"]["value"] == metrics(9)["inception-score"]["value"]
    wrong = StoredMoments(Path("x"), "ab", torch.zeros(5), torch.eye(5), None, None)
    with pytest.raises(DataError, match="reference: expected moments of 12 dimensions, got 5"):
        compare(made, None, wrong)


def test_too_few_images_are_told() -> None:
    few, many = summary(MADE[:10], 9, torch.arange(10), None), summary(REAL, 9, torch.arange(N), 10)
    said = warnings(few, many, None)
    assert len(said) == 1
    assert "samples: 10 images are too few for features of 12 dimensions: their covariance has rank 9, " in said[0]
    assert int(np.linalg.matrix_rank(few.moments.covariance().numpy())) == 9
    assert warnings(many, many, None) == []
    found = compare(few, many, None)
    assert "of 20 samples or more" in found["kid"]


def test_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics: expected some of kid, .*, got 'fid'"):
        summarise(EXTRACTOR, [], 5, ("fid",))
    with pytest.raises(DataError, match="images: expected at least 2, got 1"):
        summarise(EXTRACTOR, [], 1)
    with pytest.raises(DataError, match="images: expected each of 5 once, but 2 are missing or there twice, image 3"):
        summarise(EXTRACTOR, [(torch.arange(3), REAL[:3])], 5, ("frechet",))
    for metric in ("kid", "frechet"):
        with pytest.raises(DataError, match="each of 6 once, but 2 are missing or there twice, image 4 among them"):
            summarise(EXTRACTOR, [(torch.tensor([0, 1, 2, 3, 4, 4]), REAL[:6])], 6, (metric,))

    def broken(images: Tensor) -> Features:
        return Features(torch.where(torch.arange(len(images))[:, None] == 1, torch.nan, features(images).pooled))

    with pytest.raises(DataError, match=r"the features of image 4 are not finite \(1 such\)"):
        summarise(Extractor("x", "0", "none", broken), [(torch.tensor([3, 4, 5]), REAL[:3])], 6)
