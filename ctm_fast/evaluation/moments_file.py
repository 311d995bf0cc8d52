"""Mean and covariance on disk: ours, EDM's (``mu``, ``sigma``) and ADM's (with ``mu_s``, ``sigma_s`` besides)."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctm_fast.errors import DataError, reason
from ctm_fast.evaluation.extractors import Extractor
from ctm_fast.evaluation.moments import Moments
from ctm_fast.files import atomic_write, file_sha256

_RECORD = "ctm_fast"
"""The array in which our own files keep a JSON text of where they are from."""


@dataclass(frozen=True)
class StoredMoments:
    """What a file holds. ``record`` says where it is from; None: the file does not, as the published ones do not."""

    path: Path
    sha256: str
    mean: Tensor
    covariance: Tensor
    spatial: tuple[Tensor, Tensor] | None
    record: dict[str, Any] | None

    @property
    def count(self) -> int | None:
        """How many images they are of, where the file says so."""
        return None if self.record is None else int(self.record["reference"]["count"])

    def check(self, extractor: Extractor) -> None:
        """Raise DataError where they are of other features than ``extractor``'s: another network, file or resize.

        A published file names no extractor: it is taken for TensorFlow's Inception's, which all of them are of.
        """
        mine = {"name": extractor.name, "sha256": extractor.sha256, "resize": extractor.resize}
        theirs = {"name": "inception"} if self.record is None else self.record["extractor"]
        for key in mine:
            if key in theirs and theirs[key] != mine[key]:
                what = f"the extractor's {key}" if key != "name" else "the extractor"
                raise DataError(f"reference: {self.path}: {what} is {theirs[key]} there and {mine[key]} here")


def has_moments(path: str | Path) -> bool:
    """Whether the file is an ``.npz`` with the arrays ``mu`` and ``sigma``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def read_moments(path: str | Path) -> StoredMoments:
    """Read such a file; nothing in it is unpickled. Raises DataError naming the file and what does not fit."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s", _RECORD) if key in file.files}
        record = json.loads(str(arrays[_RECORD])) if _RECORD in arrays else None
        if record is not None:
            _check_record(record)
    except Exception as error:  # a broken archive may fail at any depth
        raise DataError(f"reference: cannot read the moments in {path}: {reason(error)[:200]}") from error
    if "mu" not in arrays or "sigma" not in arrays:
        raise DataError(f"reference: {path}: expected the arrays mu and sigma, got {', '.join(arrays) or 'neither'}")
    mean, covariance = _pair(path, arrays["mu"], arrays["sigma"])
    spatial = _pair(path, arrays["mu_s"], arrays["sigma_s"]) if {"mu_s", "sigma_s"} <= arrays.keys() else None
    return StoredMoments(path, file_sha256(path), mean, covariance, spatial, record)


def write_moments(path: str | Path, moments: Moments, spatial: Moments | None, record: dict[str, Any]) -> None:
    """Write them, whole or not at all, so that EDM's and ADM's programs read them too.

    ``record`` has ``extractor`` with ``name``, ``sha256`` and ``resize``, and ``reference`` with ``count``.
    """
    _check_record(record)
    arrays = {"mu": moments.mean.cpu().numpy(), "sigma": moments.covariance().cpu().numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.covariance().cpu().numpy()}
    arrays[_RECORD] = np.array(json.dumps(record))
    atomic_write(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def _check_record(record: Any) -> None:
    if {"name", "sha256", "resize"} - record["extractor"].keys() or type(record["reference"]["count"]) is not int:
        raise DataError("expected extractor with name, sha256 and resize, and reference with count")


def _pair(path: Path, mean: Any, covariance: Any) -> tuple[Tensor, Tensor]:
    """Both float64; DataError where they do not fit or are not finite."""
    floats = np.issubdtype(mean.dtype, np.floating) and np.issubdtype(covariance.dtype, np.floating)
    if not floats or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or len(mean) == 0:
        raise DataError(
            f"reference: {path}: expected floating-point moments [D] and [D, D], "
            f"got {mean.dtype} {list(mean.shape)} and {covariance.dtype} {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"reference: {path}: expected finite moments, got NaN or infinity")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
