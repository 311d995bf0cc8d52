"""What is trained: every variant differs from the preset in what it says, and in nothing else."""

from dataclasses import replace

from ctm_fast.experiments.variants import CM, CTM_FURTHER, CTM_GAN, CTM_PLAIN, scaled, student_run, teacher_run
from ctm_fast.training import preset
from ctm_fast.training.config import CTMConfig, GANConfig, to_dict

BASE = scaled(preset("digits"), 0.5)


def test_scale_shortens_steps_and_averages_alike() -> None:
    whole = preset("digits")
    assert (BASE.teacher.steps, BASE.ctm.steps) == (500, 200)
    for half, full in ((BASE.teacher, whole.teacher), (BASE.ctm, whole.ctm)):
        forgotten, wanted = half.ema**half.steps, full.ema**full.steps
        assert abs(forgotten - wanted) < 1e-12


def test_variants_share_a_teacher() -> None:
    other = replace(BASE, ctm=replace(BASE.ctm, steps=7, dsm_weight=0.0))
    assert teacher_run(BASE, 3) == teacher_run(other, 3)
    assert teacher_run(BASE, 3) != teacher_run(BASE, 4)
    assert teacher_run(BASE, 3).stages == ("teacher",)


def test_a_student_differs_in_its_settings_alone() -> None:
    plain, cm = (to_dict(student_run(BASE, 0, variant))["ctm"] for variant in (CTM_PLAIN, CM))
    differing = {key: value for key, value in cm.items() if plain[key] != value}
    assert differing == {"s_strategy": "smallest", "target_inner": "target-sg", "dsm_weight": 0.0}
    assert plain == to_dict(BASE)["ctm"]


def test_control_has_as_many_updates_of_the_student_as_the_adversary_run() -> None:
    gan, further = student_run(BASE, 0, CTM_GAN), student_run(BASE, 0, CTM_FURTHER)
    assert (gan.stages, further.stages) == (("gan",), ("ctm",))
    assert gan.gan.steps == 2 * further.ctm.steps == BASE.ctm.steps / 2
    assert gan.gan.start == 0  # else more of its steps would be the student's
    shared = {key: value for key, value in vars(further.ctm).items() if key != "steps"}
    assert {key: getattr(gan.gan, key) for key in shared} == shared
    assert isinstance(gan.gan, GANConfig) and further.gan == GANConfig() and gan.ctm == CTMConfig()
