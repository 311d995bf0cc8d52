"""``python -m ctm_fast.reconstruct``: the average that was not tracked, from those that were."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctm_fast.models import CTM, NetworkConfig, build_network, load_model, save_model
from ctm_fast.models.safetensors_file import write_safetensors
from ctm_fast.reconstruct import main
from ctm_fast.training.averages import Averages
from tests.command_line import assert_refused, call, tree
from tests.memory import peak
from tests.snapshots import save_snapshot

NETWORK = NetworkConfig(
    arch="ncsnpp",  # it has a buffer, of random frequencies
    img_resolution=8,
    img_channels=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)
STEPS = 200
Run = Callable[..., tuple[int, str, str]]


def weights(model: torch.nn.Module) -> Tensor:
    """All parameters in float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], Tensor], Tensor]:
    """A run's directory with averages every 10 steps of a random walk of weights; those tracked beside; the change."""
    run, tracked = tmp_path_factory.mktemp("run"), {}
    model = CTM(build_network(NETWORK, s_branch=True))
    averages = Averages(model, ["power:0.05", "power:0.10", "power:0.08", "power:0.15"])
    generator, start = torch.Generator().manual_seed(1), weights(model)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
            model.net.embedding.freqs.add_(1)
        averages.update(step)
        if step % 10 == 0:
            for name in averages.names[:2]:
                path = run / f"ema-{name.replace(':', '_')}-ctm-{step:06d}.safetensors"
                metadata = {"stage": "ctm", "step": step, "ema": name, "seed": 3}
                save_model(path, averages.model_of(name), NETWORK, metadata)
            tracked |= {(name, step): weights(averages.model_of(name)) for name in averages.names[2:]}
    return run, tracked, weights(model) - start


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line."""
    return lambda *argv: call(main, [*map(str, argv)], monkeypatch, capsys)


@pytest.mark.parametrize(("width", "step"), [("0.08", None), ("0.15", None), ("0.08", 120), ("0.15", 50)])
def test_is_the_tracked_one(
    width: str, step: int | None, truth: tuple[Path, dict[tuple[str, int], Tensor], Tensor], run: Run, tmp_path: Path
) -> None:
    """To a percent of what training changed, at the end and at a step before; the line tells the same."""
    directory, tracked, change = truth
    out = tmp_path / "out.safetensors"
    code, said, _ = run(directory, "--ema", width, "--out", out, *([] if step is None else ["--step", step]))
    assert code == 0
    model, metadata = load_model(out)
    expected = tracked[f"power:{width}", step or STEPS]
    error = float((weights(model) - expected).norm() / change.norm())
    told = float(said.split()[-3]) / 100
    assert error < 0.01 and 0 < told < 0.1 and metadata["fit"] == pytest.approx(told, rel=0.05)
    assert (metadata["ema"], metadata["step"], metadata["stage"]) == (f"power:{width}", step or STEPS, "ctm")
    snapshot, _ = load_model(directory / f"ema-power_0.05-ctm-{step or STEPS:06d}.safetensors")
    assert torch.equal(model.net.embedding.freqs, snapshot.net.embedding.freqs)


def test_a_tracked_width_is_itself(
    truth: tuple[Path, dict[tuple[str, int], Tensor], Tensor], run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert run(truth[0], "--ema", 0.05, "--out", out)[0] == 0
    expected = weights(load_model(truth[0] / f"ema-power_0.05-ctm-{STEPS:06d}.safetensors")[0])
    assert (weights(load_model(out)[0]) - expected).abs().max() <= 2e-7 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "names", "part"),
    [
        ("--ema 0.01", "--ema", "whose best fit is"),
        ("--ema 0.27", "--ema", "whose best fit is"),
        ("--ema 0.3", "--ema: expected a width sigma_rel above 0 and below 0.2887", "got 0.3"),
        ("--ema nan", "--ema: expected a width", "got nan"),
        ("--ema wide", "argument --ema", "wide"),
        ("--ema 0.08 --step 201", "--step", "10 to 200, the steps of snapshots, got 201"),
        ("--ema 0.08 --step 9", "--step", "got 9"),
        ("--ema 0.08 --stage teacher", "--stage: expected one of ctm, got teacher", ""),
        ("--ema 0.08 --out out.png", "--out: expected a .safetensors", "out.png"),
        ("--ema 0.08 --out absent/out.safetensors", "--out: expected a place in a directory", "absent"),
        ("--ema 0.08 --out ema-power_0.05-ctm-000010.safetensors", "--out: expected a file other", ""),
        ("--ema 0.08 --threads 0", "--threads", ""),
    ],
)
def test_refused(
    arguments: str,
    names: str,
    part: str,
    truth: tuple[Path, dict[tuple[str, int], Tensor], Tensor],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(truth[0])
    before = tree(truth[0])
    argv = arguments.split()
    out = [] if "--out" in argv else ["--out", "out.safetensors"]
    assert_refused(run(truth[0], *argv, *out), names, part)
    assert tree(truth[0]) == before


def test_refused_files(truth: tuple[Path, dict[tuple[str, int], Tensor], Tensor], run: Run, tmp_path: Path) -> None:
    """Named: no averages, two stages, another network, other metadata, a broken file."""
    out, directory = tmp_path / "out.safetensors", tmp_path / "run"
    assert_refused(run(tmp_path, "--ema", 0.08, "--out", out), "RUNDIR: expected the directory of a run", str(tmp_path))
    shutil.copytree(truth[0], directory)
    model, _ = load_model(truth[0] / f"ema-power_0.05-ctm-{STEPS:06d}.safetensors")
    other = directory / "ema-power_0.05-gan-000010.safetensors"
    save_model(other, model, NETWORK, {"stage": "gan", "step": 10, "ema": "power:0.05"})
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "--stage: expected one of ctm, gan, got none")
    save_model(other, model, NETWORK, {"stage": "ctm", "step": 10, "ema": "0.999"})
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "RUNDIR", other.name, "got 'ctm', 10 and '0.999'")
    save_snapshot(other, CTM)
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "RUNDIR", other.name, "got 'None'")
    build = build_network(NETWORK, model_channels=16, s_branch=True)
    save_model(other, CTM(build), build.config, {"stage": "ctm", "step": 10, "ema": "power:0.05"})
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "RUNDIR", other.name, "another architecture")
    other.write_bytes(other.read_bytes()[:-100])
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "RUNDIR", other.name, "not a complete")
    with other.open("wb") as file:
        write_safetensors(file, {}, {})
    assert_refused(run(directory, "--ema", 0.08, "--out", out), "RUNDIR", other.name, "expected format")
    assert not out.exists()


def test_memory(tmp_path: Path) -> None:
    """One model, and no more for more files: 1.5 times its size, whatever their number."""
    net = build_network(NETWORK, model_channels=64, num_blocks=3, s_branch=True)
    for step in range(10, 110, 10):
        path = tmp_path / f"ema-power_0.05-ctm-{step:06d}.safetensors"
        save_model(path, CTM(net), net.config, {"stage": "ctm", "step": step, "ema": "power:0.05"})
    code = "reconstruct(list(Path('.').glob('ema*')), 0.05, Path('out.safetensors'), stage=None, step=None)"
    before = "import torch\nfrom pathlib import Path\nfrom ctm_fast.training.reconstruction import reconstruct\n"
    before += "torch.set_num_threads(1); torch.ones(2, 2).double().add_(torch.ones(2, 2), alpha=2)"
    size = path.stat().st_size / 1024
    assert size > 15_000
    assert peak(code, cwd=tmp_path, before=before) < 1.5 * size + 14_000
