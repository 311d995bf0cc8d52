"""Moments on disk: ours and the published forms, and that those of other features are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctm_fast.errors import DataError
from ctm_fast.evaluation.extractors import Extractor, Features
from ctm_fast.evaluation.moments import Moments
from ctm_fast.evaluation.moments_file import has_moments, read_moments, write_moments

EXTRACTOR = Extractor("mine", "ab", "none", lambda x: Features(x.flatten(1).float()))
RECORD = {"extractor": {"name": "mine", "sha256": "ab", "resize": "none"}, "reference": {"count": 9, "source": "x"}}


def some(d: int, seed: int = 0) -> Moments:
    found = Moments(d)
    found.update(torch.randn(9, d, generator=torch.Generator().manual_seed(seed)))
    return found


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    write_moments(path, some(3), some(4, 1), RECORD)
    assert has_moments(path)
    found = read_moments(path)
    assert torch.equal(found.mean, some(3).mean)
    assert torch.equal(found.covariance, some(3).covariance())
    assert found.spatial is not None
    assert torch.equal(found.spatial[1], some(4, 1).covariance())
    assert found.record == RECORD
    assert found.count == 9
    found.check(EXTRACTOR)
    with np.load(path) as file:  # as EDM's and ADM's programs do
        assert file["mu"].shape == (3,) and file["sigma_s"].shape == (4, 4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("theirs", "ab", "none"), "the extractor is mine there and theirs here"),
        (("mine", "cd", "none"), "the extractor's sha256 is ab there and cd here"),
        (("mine", "ab", "antialiased"), "the extractor's resize is none there and antialiased here"),
    ],
)
def test_other_features_are_refused(other: tuple[str, str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    write_moments(path, some(3), None, RECORD)
    with pytest.raises(DataError, match=f"reference: .*stats.npz: {message}"):
        read_moments(path).check(Extractor(*other, EXTRACTOR.extract))


def test_a_published_file_is_of_inception(tmp_path: Path) -> None:
    path = tmp_path / "cifar10-32x32.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    found = read_moments(path)
    assert (found.record, found.count, found.spatial) == (None, None, None)
    found.check(Extractor("inception", "ab", "TensorFlow 1 bilinear to 299", EXTRACTOR.extract))
    with pytest.raises(DataError, match="the extractor is inception there and mine here"):
        found.check(EXTRACTOR)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "expected the arrays mu and sigma, got mu"),
        (
            {"mu": np.zeros(3), "sigma": np.eye(4)},
            r"expected floating-point moments .*, got float64 \[3\] and float64 \[4, 4\]",
        ),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "expected floating-point moments"),
        ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "expected finite moments, got NaN or infinity"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot read the moments in .*allow_pickle=False"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "ctm_fast": np.array("{")}, "cannot read the moments in .*JSON"),
        (
            {"mu": np.zeros(1), "sigma": np.eye(1), "ctm_fast": np.array(json.dumps({"extractor": {}}))},
            "cannot read the moments in",
        ),
    ],
)
def test_broken_files(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"reference: .*{message}"):
        read_moments(path)


def test_not_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    path.write_bytes(b"mu")
    assert not has_moments(path)
    assert not has_moments(tmp_path / "none.npz")
    with pytest.raises(DataError, match="cannot read the moments"):
        read_moments(path)
