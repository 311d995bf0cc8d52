"""What a step asks of its networks, and of memory, beside the published way of writing it."""

from pathlib import Path

import pytest

from tests import memory
from tests.training.evaluations import Evaluations
from tests.training.test_ctm_options import BASE, BATCH, SEED, draw, steps

MEMORY = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from benchmarks.bench_training_cost import FAST, NAIVE, batch, generator_step, steps
made, piece = steps("pseudo-huber"), batch()
step = made[{way}]
"""


@pytest.mark.parametrize("adversarial", [False, True])
def test_evaluations(adversarial: bool) -> None:
    """Naive: 5 + 2k passes, and 6 (8 with the adversarial loss) for gradients. Hops that lead nowhere are not made."""
    naive, fast = steps(BASE, adversarial=adversarial)
    piece = draw(BASE, SEED)
    k = len(piece.way) - 1
    counts = {}
    for step in (naive, fast):
        models = [step.student, *([naive.target, naive.teacher] if step is naive else [])]
        if step is fast:
            models += [fast.target_jump.__self__, fast.teacher_denoise.__self__]
        counted = Evaluations(models)

        def call(step=step) -> None:
            if step is naive:
                naive.backward(piece, naive.consistency_target(naive.solve(piece), piece), adversarial=adversarial)
            else:
                target = fast.consistency_target(fast.solve(piece.x_t, piece.way, piece.labels), piece)
                fast.backward([(piece, target)], adversarial=adversarial)

        counts[type(step).__name__] = counted.of(call)
    moves, on = BATCH - int(piece.stays_end.sum()), BATCH - int(piece.stays_u.sum())
    assert 0 < moves < BATCH and 0 < on < BATCH
    assert counts["NaiveStep"] == (5 + 2 * k + (8 if adversarial else 6)) * BATCH
    #              solver  student, twice, with its gradients  inner hop  outer hops, and their gradients
    assert counts["CTMStep"] == (2 * k + 2 * 3) * BATCH + on + moves * (2 + (2 if adversarial else 1))


@pytest.mark.long
def test_memory(tmp_path: Path) -> None:
    """Of the largest allocation at any moment, at the size that is timed: at most 0.7 of the naive step's."""
    peaks = {
        way: memory.peak(
            "generator_step(step, piece, adversarial=False)",
            cwd=memory.ROOT,
            before=MEMORY.format(root=str(memory.ROOT), way=way),
        )
        for way in ("FAST", "NAIVE")
    }
    assert peaks["FAST"] <= 0.7 * peaks["NAIVE"], peaks
