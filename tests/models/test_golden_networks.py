"""The networks and models against the published code, and the import and export of its weights."""

import pytest
import torch
from torch import Tensor

from ctm_fast.models import CTM, EDMDenoiser, to_published
from tests.golden import Golden, assert_agree

STUDENTS = [
    "cifar/net_ddpmpp_uncond.npz",
    "cifar/net_ddpmpp_cond.npz",
    "cifar/net_ncsnpp_uncond.npz",
    "imagenet/net_adm_uncond.npz",
    "imagenet/net_adm_cond.npz",
]
TEACHERS = ["edm/edm_ddpmpp_cond.npz", "edm/edm_ncsnpp_uncond.npz", "edm/edm_adm_cond.npz"]
FILES = [(name, "w") for name in (*STUDENTS, *TEACHERS, "cifar/samplers.npz", "imagenet/samplers.npz")] + [
    (f"{folder}/train_step.npz", prefix) for folder in ("cifar", "imagenet") for prefix in ("student", "ema", "teacher")
]
"""Every published state dict that there is."""
LOW = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""What the network computes in -> how closely it agrees then."""


@torch.no_grad()
def check_student(golden: Golden, model: CTM, tolerance: float) -> None:
    x, t, s, labels = golden["x"], golden["t"], golden["s"], golden.get("y")
    assert_agree(model.raw(x, t, s, labels).float(), golden["F"], tolerance)
    assert_agree(model.inner(x, t, s, labels), golden["g"], tolerance)
    assert_agree(model.jump(x, t, s, labels), golden["G"], tolerance)
    assert_agree(model.denoise(x, t, labels), golden["D_at_t"], tolerance)


@pytest.mark.parametrize("name", STUDENTS)
def test_student(name: str) -> None:
    golden = Golden(name)
    check_student(golden, golden.student("w"), golden.tolerance)


@pytest.mark.parametrize("name", [name for name in STUDENTS if "adm" in name])
def test_adm_told_the_published_r(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With r(t) rounded as the published code rounds it, ADM agrees as closely as the others."""
    golden = Golden(name)
    model = golden.student("w")

    def features(level: Tensor) -> Tensor:
        angle = (250 * torch.log(level + 1e-44))[:, None] * model.net.embedding.freqs
        return torch.cat([angle.cos(), angle.sin()], 1)

    monkeypatch.setattr(
        "ctm_fast.nn.embedding.noise_embed", lambda t, s, *, freqs, c_noise, order: (features(t), features(s))
    )
    check_student(golden, model, 1e-5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", STUDENTS)
def test_student_in_low_precision(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    model = golden.student("w")
    model.dtype = dtype
    check_student(golden, model, LOW[dtype])


def check_teacher(golden: Golden, model: EDMDenoiser, tolerance: float) -> None:
    x = golden["x"].requires_grad_()
    D_x = model.denoise(x, golden["sigma"], golden.get("class_labels"))
    assert_agree(D_x.detach(), golden["D_x"], tolerance)
    (dx,) = torch.autograd.grad((D_x * golden["r"]).sum(), x)
    # Backward passes round as often again as forward ones do.
    assert_agree(dx, golden["dx"], tolerance if tolerance <= 1e-5 else 1.5 * tolerance)


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_and_its_input_gradient(name: str) -> None:
    golden = Golden(name)
    check_teacher(golden, golden.teacher("w"), golden.tolerance)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_in_low_precision(name: str, dtype: torch.dtype) -> None:
    golden = Golden(name)
    model = golden.teacher("w")
    model.dtype = dtype
    check_teacher(golden, model, LOW[dtype])


@pytest.mark.parametrize("name", [name for name in TEACHERS if "_cond" in name])
def test_labels_as_indices_are_labels_as_one_hot(name: str) -> None:
    golden = Golden(name)
    model = golden.teacher("w")
    with torch.no_grad():
        D_x = model.denoise(golden["x"], golden["sigma"], golden["class_labels"].argmax(1))
    assert_agree(D_x, golden["D_x"])


@pytest.mark.parametrize(("name", "prefix"), FILES)
def test_export_gives_back_the_published_tensors(name: str, prefix: str) -> None:
    golden = Golden(name)
    published, exported = golden.tensors(prefix), to_published(golden.model(prefix))
    assert exported.keys() == published.keys()
    for key, tensor in exported.items():
        assert tensor.dtype == published[key].dtype, key
        assert torch.equal(tensor, published[key]), key
        assert tensor.is_contiguous(), key


@pytest.mark.parametrize("name", ["cifar/net_ddpmpp_uncond.npz", "edm/edm_adm_cond.npz"])
def test_qkv_order_matters(name: str) -> None:
    """The permutation is not the identity: without it the outputs differ."""
    golden = Golden(name)
    published = golden.tensors("w")
    ours = golden.model("w").net.state_dict()
    keys = [key for key in ours if key.endswith(".qkv.weight")]
    assert keys
    for key in keys:
        assert not torch.equal(ours[key], published["model." + key.replace(".attention", "")])
