"""What 50,000 samples of 2,048 dimensions cost: run in a process of its own, whose peak is asked afterwards."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys, time, torch
from ctm_fast.evaluation.extractors import Extractor, Features
from ctm_fast.evaluation.frechet import frechet_distance
from ctm_fast.evaluation.measure import compare, summarise

n, d = map(int, sys.argv[1:])
metrics = ("frechet", "kid")
torch.set_num_threads(1)

def features(images):  # the pixels of an image are its number and its side
    made = []
    for low, high, side in images.view(-1, 3).tolist():
        generator = torch.Generator().manual_seed(low + 256 * high + 65536 * side)
        made.append(torch.randn(d, generator=generator).relu() * (1 + side / 4))
    return Features(torch.stack(made))

def batches(side):
    for index in torch.arange(n).split(500):
        pixels = torch.stack([index % 256, index // 256, torch.full_like(index, side)], 1)
        yield index, pixels.to(torch.uint8).view(-1, 1, 1, 3)

extractor = Extractor("normal", "", "none", features)
samples = summarise(extractor, batches(1), n, metrics)
reference = summarise(extractor, batches(0), n, metrics, samples=n)
one, two = samples.moments, reference.moments
start = time.process_time()
distance = frechet_distance(one.mean, one.covariance(), two.mean, two.covariance())
seconds = time.process_time() - start
del one, two
found = compare(samples, reference, None, metrics)
assert found["frechet"]["value"] == distance and found["frechet"]["floor"] < distance
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "distance": distance, "kernel": found["kid"]["value"]}))
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
    """Two sets of features, their moments, the Frechet distance and 50 blocks of the kernel distance.

    Seconds of one processor, which other work on the machine does not lengthen much; two take less.
    """
    found = measured(50_000, 2048)
    assert found["distance"] == pytest.approx(expected(2048), rel=0.3)
    assert found["peak"] < 1.5e9
    assert found["seconds"] < 30
