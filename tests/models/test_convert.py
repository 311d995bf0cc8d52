"""Import of published state dicts: what is told, what is refused and how, and what is as good as published."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, NetworkConfig, describe, from_published, to_published
from tests.golden import Golden
from tests.models.small import SMALL, random_network

DDPMPP, ADM, EDM_ADM, NCSNPP = (
    "cifar/net_ddpmpp_cond.npz",
    "imagenet/net_adm_cond.npz",
    "edm/edm_adm_cond.npz",
    "edm/edm_ncsnpp_uncond.npz",
)
Tensors = dict[str, Tensor]


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def change(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


# File, what is done to its tensors, what is told besides what it says itself, and the message.
REFUSED: dict[str, tuple[str, Callable[[Tensors], object], dict[str, Any], str]] = {
    "missing": (DDPMPP, without("model.map_layer0.bias"), {}, r"1 missing \['model.map_layer0.bias'\], 0 left over"),
    "left over": (DDPMPP, put("model.strange", torch.zeros(1)), {}, r"0 missing \[\], 1 left over \['model.strange'\]"),
    "renamed": (
        ADM,
        rename("input_blocks.1.0.out_layers.3.bias", "input_blocks.1.0.out_layers.4.bias"),
        {},
        r"1 missing \['input_blocks.1.0.out_layers.3.bias'\], 1 left over \['input_blocks.1.0.out_layers.4.bias'\]",
    ),
    "filter is missing": (
        NCSNPP,
        without("model.enc.8x8_down.skip.resample_filter"),
        {},
        "1 missing .*resample_filter",
    ),
    "other filter": (
        NCSNPP,
        change("model.enc.8x8_aux_residual.resample_filter", lambda tensor: tensor.flip(2) + 1e-3),
        {},
        "8x8_aux_residual.resample_filter: expected the filter of architecture ncsnpp, got another",
    ),
    "frequencies are missing": (
        NCSNPP,
        without("model.map_noise.freqs"),
        {"arch": "ncsnpp"},
        "arch: expected 'ncsnpp'",
    ),
    "other shape": (
        EDM_ADM,
        change("model.dec.8x8_in0.qkv.bias", lambda tensor: tensor[:-3]),
        {},
        r"model.dec.8x8_in0.qkv.bias: expected shape \[192\], got \[189\]",
    ),
    "transposed": (ADM, change("label_emb.weight", lambda tensor: tensor.t()), {}, "label_dim: expected 10"),
    "other dtype": (
        ADM,
        change("out.0.bias", lambda tensor: tensor.double()),
        {},
        "out.0.bias: expected float32, float16 or bfloat16, got torch.float64",
    ),
    "twice": (DDPMPP, put("map_layer0.bias", torch.zeros(64)), {}, "expected each one once, got some both with model"),
    "nothing": (DDPMPP, dict.clear, {}, "expected a published U-Net of ddpmpp, .* got 0 tensors"),
    "something else": (
        DDPMPP,
        lambda tensors: (tensors.clear(), tensors.update({"unet.emb_fourier.freqs": torch.zeros(1)})),
        {},
        r"expected a published U-Net .* got 1 tensors such as \['unet.emb_fourier.freqs'\]",
    ),
    "scalar where sizes are read": (
        ADM,
        put("time_embed.0.weight", torch.tensor(1.0)),
        {},
        "architecture adm, got Ind",
    ),
    "no width": (DDPMPP, put("model.map_layer0.weight", torch.zeros(64, 0)), {}, "ddpmpp, got ZeroDivisionError"),
    "encoder only": (
        ADM,
        lambda t: [t.pop(k) for k in list(t) if "output" in k],
        {},
        "architecture adm, got IndexError",
    ),
    "other classes": (DDPMPP, dict, {"label_dim": 100}, "label_dim: expected 100 as configured, got tensors of 10"),
    "other levels": (ADM, dict, {"channel_mult": [1, 2]}, r"channel_mult: expected \(1, 2\) as .* tensors of \(1, 1\)"),
    "other attention": (ADM, dict, {"attn_resolutions": [16]}, r"attn_resolutions: expected \(16,\) .* of \(8,\)"),
    "other blocks": (DDPMPP, dict, {"num_blocks": 10**9}, "num_blocks: expected 1000000000 as configured"),
    "other resolution": (DDPMPP, dict, {"img_resolution": 32}, "img_resolution: expected 32 as configured"),
    "other architecture": (DDPMPP, dict, {"arch": "ncsnpp"}, "arch: expected 'ncsnpp' as .* tensors of 'ddpmpp'"),
    "odd resolution": (
        ADM,
        dict,
        {"img_resolution": 15, "attn_resolutions": [7]},
        "expected a multiple of 2 for 2 lev",
    ),
    "no resolution": (
        ADM,
        dict,
        {"img_resolution": -16},
        "attn_resolutions: |img_resolution: expected an integer from 1",
    ),
    "heads do not divide": (
        ADM,
        dict,
        {"head_channels": 24},
        "head_channels: expected a divisor of 32 channels, got 24",
    ),
    "heads are a fraction": (
        ADM,
        dict,
        {"head_channels": 0.5},
        "head_channels: expected an integer from 0 on, got 0.5",
    ),
    "heads are negative": (ADM, dict, {"head_channels": -16}, "head_channels: expected an integer from 0 on, got -16"),
    "dropout is a word": (ADM, dict, {"dropout": "much"}, "TypeError"),
    "dropout is everything": (ADM, dict, {"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
    "sigma_data is 0": (ADM, dict, {"sigma_data": 0}, "sigma_data: expected a positive number, got 0"),
    "sigma_data is nan": (ADM, dict, {"sigma_data": float("nan")}, "sigma_data: expected a positive number, got nan"),
    "network is a word": (ADM, dict, {"network": "ADM"}, "config: expected a mapping under network, got str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, damage, told, message = REFUSED[case]
    golden = Golden(name)
    tensors = golden.tensors("w")
    damage(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        from_published(tensors, {**golden.meta, **told})
    assert "\n" not in str(error.value)


def test_refused_before_it_takes_memory() -> None:
    """A file of megabytes that claims a network of terabytes."""
    tensors = Golden(EDM_ADM).tensors("w")
    for size, width in ((16, 3_200_000), (8, 6_400_000)):
        tensors[f"model.enc.{size}x{size}_block0.conv0.weight"] = torch.zeros(width, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"expected shape .* got"):
        from_published(tensors)
    tensors["model.map_layer0.weight"] = torch.zeros(0, 10**13)  # as wide as can be said without an element
    with pytest.raises(CheckpointError, match=r"got 4 blocks and 10000000000000 channels"):
        from_published(tensors)


def test_without_a_configuration_what_is_assumed_is_said() -> None:
    golden = Golden(ADM)
    tensors = golden.tensors("w")
    described = describe(tensors)
    assert described.network.img_resolution == 64  # guided-diffusion's names do not tell
    assert described.network.attn_resolutions == (32,)
    assert "assumed: img_resolution 64, dropout 0.0, head_channels 64" in str(described)
    with pytest.raises(CheckpointError, match=r"head_channels: expected a divisor of 32 .*assumed: .*head_channels 64"):
        from_published(tensors)
    told = describe(tensors, {"img_resolution": 16, "channels_per_head": 16})
    assert told.network.attn_resolutions == (8,)
    assert told.network.head_channels == 16
    assert told.assumed == ("dropout", "label_dropout", "sigma_data")
    assert describe(tensors, {**golden.meta, "label_dropout": 0.0}).assumed == ()
    assert describe(tensors, told.network).assumed == ("sigma_data",)


@pytest.mark.parametrize("name", [DDPMPP, EDM_ADM, NCSNPP])
def test_with_and_without_the_wrappers_prefix(name: str) -> None:
    golden = Golden(name)
    tensors = {key.removeprefix("model."): tensor for key, tensor in golden.tensors("w").items()}
    exported = to_published(from_published(tensors, golden.meta))
    assert exported.keys() == golden.tensors("w").keys()
    assert all(torch.equal(tensor, golden.tensors("w")[key]) for key, tensor in exported.items())


def test_half_precision_files_are_widened_exactly() -> None:
    golden = Golden(ADM)
    tensors = {key: tensor.half() for key, tensor in golden.tensors("w").items()}
    model = from_published(tensors, golden.meta)
    assert {tensor.dtype for tensor in model.net.state_dict().values()} == {torch.float32}
    for key, tensor in to_published(model).items():
        assert torch.equal(tensor, tensors[key].float()), key


def test_the_model_is_a_copy() -> None:
    """Of all tensors, and nothing is drawn for it."""
    golden = Golden(DDPMPP)
    tensors = golden.tensors("w")
    before = torch.get_rng_state()
    model = from_published(tensors, golden.meta)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, golden.tensors("w")[key]) for key, tensor in tensors.items())
    weights = [weight for weight in model.parameters() if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize("heads", [0, 16])
@pytest.mark.parametrize("s_branch", [True, False])
@pytest.mark.parametrize("arch", SMALL)
def test_round_trip_of_networks_that_were_not_published(arch: str, s_branch: bool, heads: int) -> None:
    """Several heads, labels and the s-branch in every architecture; and the sizes are found out again."""
    config = NetworkConfig(**{**vars(SMALL[arch]), "head_channels": heads})
    model = (CTM if s_branch else EDMDenoiser)(random_network(config, s_branch=s_branch), 0.7)
    exported = to_published(model)
    again = from_published(exported, {"sigma_data": 0.7, "head_channels": heads, "dropout": 0.0, "img_resolution": 8})
    assert type(again) is type(model)
    assert again.sigma_data == 0.7
    assert again.net.config == config
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_what_no_published_network_has_is_not_exported() -> None:
    net = random_network(NetworkConfig(**{**vars(SMALL["adm"]), "augment_dim": 9}), s_branch=False)
    with pytest.raises(CheckpointError, match=r"map_augment.weight: no published network of architecture adm"):
        to_published(EDMDenoiser(net))
