"""The networks and models against the published code, and the import and export of its weights."""

import pytest
import torch
from torch.testing import assert_close

from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, from_published, to_published
from tests.golden import Golden, assert_agree

STUDENTS = ["cifar/net_ddpmpp_uncond.npz", "cifar/net_ddpmpp_cond.npz"]


@pytest.mark.parametrize("name", STUDENTS)
def test_student(name: str) -> None:
    golden = Golden(name)
    model = CTM(golden.network("w"), golden.meta["sigma_data"]).eval()
    x, t, s, labels = golden["x"], golden["t"], golden["s"], golden.get("y")
    with torch.no_grad():
        assert_agree(model.raw(x, t, s, labels), golden["F"])
        assert_agree(model.inner(x, t, s, labels), golden["g"])
        assert_agree(model.jump(x, t, s, labels), golden["G"])
        assert_agree(model.denoise(x, t, labels), golden["D_at_t"])


def test_teacher_and_its_input_gradient() -> None:
    golden = Golden("edm/edm_ddpmpp_cond.npz")
    model = EDMDenoiser(golden.network("w"), golden.meta["sigma_data"]).eval()
    x = golden["x"].requires_grad_()
    D_x = model.denoise(x, golden["sigma"], golden["class_labels"])
    assert_agree(D_x.detach(), golden["D_x"])
    (dx,) = torch.autograd.grad((D_x * golden["r"]).sum(), x)
    assert_agree(dx, golden["dx"])


def test_labels_as_indices_are_labels_as_one_hot() -> None:
    golden = Golden("edm/edm_ddpmpp_cond.npz")
    model = EDMDenoiser(golden.network("w"), golden.meta["sigma_data"]).eval()
    indices = golden["class_labels"].argmax(1)
    with torch.no_grad():
        assert_agree(model.denoise(golden["x"], golden["sigma"], indices), golden["D_x"])


@pytest.mark.parametrize("name", [*STUDENTS, "edm/edm_ddpmpp_cond.npz"])
def test_export_gives_back_the_published_tensors(name: str) -> None:
    golden = Golden(name)
    exported = to_published(golden.network("w"), golden.config)
    published = golden.tensors("w")
    left_out = set(published.keys() - exported.keys())
    assert exported.keys() <= published.keys()
    assert all("resample_filter" in key or "map_augment" in key for key in left_out)
    for key, tensor in exported.items():
        assert_close(tensor, published[key], rtol=0, atol=0)


def test_qkv_order_matters() -> None:
    """The permutation is not the identity: without it the outputs differ."""
    golden = Golden(STUDENTS[0])
    key = next(key for key in golden.tensors("w") if key.endswith(".qkv.weight"))
    exported = golden.network("w").state_dict()
    ours = next(tensor for name, tensor in exported.items() if name.endswith(".qkv.weight"))
    assert not torch.equal(ours, golden.tensors("w")[key])


def test_a_missing_and_a_strange_tensor_are_named() -> None:
    golden = Golden(STUDENTS[0])
    tensors = golden.tensors("w")
    tensors["model.strange"] = tensors.pop("model.map_layer0.bias")
    with pytest.raises(CheckpointError, match=r"embedding\.map_layer0\.bias.*strange"):
        from_published(tensors, golden.config)
