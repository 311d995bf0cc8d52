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
from ctm_fast.training.ctm_stage import CTMStage, distance_of
from ctm_fast.training.execution import Execution
from ctm_fast.training.regions import Regions
from ctm_fast.training.student import fresh_student

STEP = 1
"""The same update each time: its number decides how many steps the solver takes."""


def test_train_step(benchmark: BenchmarkFixture) -> None:
    dataset = load_dataset("digits", resolution=8, labels=True)

    def call(way: Way) -> Callable[[], dict[str, Tensor]]:
        teacher = EDMDenoiser(build_network(DIGITS.network, s_branch=False), DIGITS.sigma_data)
        regions = Regions(compile=way.compiled, device=DEVICE)
        student, distance = fresh_student(DIGITS, "ctm", teacher), distance_of(DIGITS.ctm, DEVICE)
        stage = CTMStage(DIGITS, dataset, Execution(DEVICE), regions, student, teacher, distance)
        return lambda: stage.train_step(STEP)

    calls = {way: call(way) for way in (EAGER, COMPILED, DEFAULTS)}
    result = compare(benchmark, calls, baseline=COMPILED, serves=("philox_normal",), rounds=5)
    check_default(result, DEFAULTS)
