"""One CTM training step of the preset ``digits``: teacher's solver, target, both losses, adaptive weight, update.

What is compiled is what ``ctm_fast.train --compile`` compiles (``training/regions.py``), with the default kernels and
in ``use_reference()``.
"""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import COMPILED, DEVICE, EAGER, Way, check_default, compare
from benchmarks.networks import DEFAULTS, DIGITS
from ctm_fast.data import load_dataset
from ctm_fast.models import EDMDenoiser, build_network
from ctm_fast.training.ctm_stage import CTMStage
from ctm_fast.training.regions import Regions

STEP = 1
"""The same update each time: its number decides how many steps the solver takes."""


def test_train_step(benchmark: BenchmarkFixture) -> None:
    dataset = load_dataset("digits", resolution=8, labels=True)

    def call(way: Way) -> Callable[[], dict[str, Tensor]]:
        teacher = EDMDenoiser(build_network(DIGITS.network, s_branch=False), DIGITS.sigma_data)
        stage = CTMStage(DIGITS, dataset, DEVICE, Regions(compile=way.compiled, device=DEVICE), teacher)
        return lambda: stage.train_step(STEP)

    calls = {way: call(way) for way in (EAGER, COMPILED, DEFAULTS)}
    result = compare(benchmark, calls, baseline=COMPILED, serves=("philox_normal",), rounds=5)
    check_default(result, DEFAULTS)
