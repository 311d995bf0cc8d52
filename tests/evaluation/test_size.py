"""What 50,000 samples of 2,048 dimensions cost: run in a process of its own, whose peak is asked afterwards."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys, time, torch
from ctm_fast.evaluation.feature_table import FeatureTable
from ctm_fast.evaluation.frechet import frechet_distance
from ctm_fast.evaluation.kernel_distance import kernel_distance
from ctm_fast.evaluation.moments import Moments

n, d = map(int, sys.argv[1:])
torch.set_num_threads(2)
sides = []
for seed in (0, 1):
    generator = torch.Generator().manual_seed(seed)
    moments, table = Moments(d), FeatureTable(n, d)
    for index in torch.arange(n).split(500):
        features = torch.randn(len(index), d, generator=generator).relu() * (1 + seed / 4)
        moments.update(features)
        table.update(features, index)
    table.all_reduce()
    sides.append((moments, table.features))
(one, real), (two, generated) = sides
start = time.perf_counter()
distance = frechet_distance(one.mean, one.covariance(), two.mean, two.covariance())
seconds = time.perf_counter() - start
kernel = kernel_distance(real, generated)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "distance": distance, "kernel": kernel.value}))
"""


def measured(n: int, d: int) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, str(n), str(d)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found: dict[str, float] = json.loads(process.stdout)
    return found


def expected(d: int) -> float:
    """Of max(0, z) and 1.25 max(0, z), z normal, in each dimension: (difference of means)^2 + (of deviations)^2."""
    return d * 0.25**2 * 0.5  # mean^2 + variance of max(0, z) is E max(0, z)^2 = 1/2


def test_small() -> None:
    assert measured(20_000, 16)["distance"] == pytest.approx(expected(16), rel=0.1)


@pytest.mark.long
def test_fifty_thousand_samples_fit() -> None:
    """Two sets of features, their moments, the Frechet distance and 50 blocks of the kernel distance."""
    found = measured(50_000, 2048)
    assert found["distance"] == pytest.approx(expected(2048), rel=0.3)
    assert found["peak"] < 1.5e9
    assert found["seconds"] < 30
