"""Width and depth of the network against one-step quality: do jump and score fit into one small network?"""

from ctm_fast.experiments.figures import compare_seeds
from ctm_fast.experiments.lab import Experiment, Finding, Lab, Plot
from ctm_fast.experiments.sampling import jump_samples, solver_samples
from ctm_fast.experiments.variants import CTM_PLAIN, Size
from ctm_fast.models import CTM
from ctm_fast.pictures import Curve

SIZES = (Size(16, 1), Size(24, 1), Size(32, 1), Size(32, 2))
TEACHER_NFE = 35


def investigate(lab: Lab) -> Finding:
    """Each size with a teacher of its own."""
    levels = lab.trainings.base.levels
    rows = ("teacher, Heun", "CTM, its score", "CTM, one jump")
    curves: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
    ratios = {}
    for size in SIZES:
        teachers = [lab.trainings.teacher(seed, size).model for seed in lab.seeds]
        students = [lab.trainings.student(CTM_PLAIN, seed, size).model for seed in lab.seeds]
        assert all(isinstance(model, CTM) for model in students)
        parameters = sum(parameter.numel() for parameter in students[0].parameters())
        sets = (
            (solver_samples(m, levels, lab.count, "Heun", nfe=TEACHER_NFE) for m in teachers),
            (solver_samples(m, levels, lab.count, "Heun", nfe=TEACHER_NFE) for m in students),
            (jump_samples(m, levels, lab.count, nfe=1) for m in students if isinstance(m, CTM)),
        )
        for name, samples in zip(rows, sets, strict=True):
            title = _row(size, parameters, name)
            lab.measure(title, samples)
            curves[name][0].append(parameters / 1e6)
            curves[name][1].append(lab.frechet(title).mean)
        ratios[size] = curves[rows[2]][1][-1] / curves[rows[0]][1][-1]
        if size == SIZES[0]:
            smallest = lab.frechet(_row(size, parameters, rows[2]))
        elif size == SIZES[-1]:
            deepest = lab.frechet(_row(size, parameters, rows[2]))
    by_size: dict[str, Curve] = {
        name: tuple(zip(*sorted(zip(*curve, strict=True)), strict=True))  # type: ignore[misc]
        for name, curve in curves.items()
    }
    told = ", ".join(f"{size.channels}x{size.blocks}: {ratio:.2g}" for size, ratio in ratios.items())
    return Finding(
        {"width x blocks": lab.table("width x blocks, millions of parameters, samples")},
        Plot(by_size, "capacity", "millions of parameters", "in-domain Frechet distance"),
        [
            "The deepest network against the narrowest, one jump (expected: lower): "
            f"{compare_seeds(deepest, smallest)}.",
            f"One jump over its teacher's {TEACHER_NFE} evaluations, the same network: {told}. If the second output "
            "were what a small network cannot afford, this ratio would fall as the network grows, and the student's "
            "own score would be behind its teacher's in small networks above all.",
        ],
        [
            *lab.judge.describe(),
            "Each size has a teacher and a student of as many steps as all others; larger ones are not trained longer.",
        ],
        lab.record() | {"ratios": {f"{size.channels}x{size.blocks}": ratio for size, ratio in ratios.items()}},
    )


def _row(size: Size, parameters: int, name: str) -> str:
    return f"{size.channels}x{size.blocks}, {parameters / 1e6:.2f}, {name}"


EXPERIMENT = Experiment(
    "Capacity",
    "One network gives the jump and, at s = t, the score. Does its size hold one-step quality back?",
    investigate,
    variants=(CTM_PLAIN,),
    sizes=SIZES,
    most_seeds=1,
)
