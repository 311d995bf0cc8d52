"""Every command and every line of Python that README.md shows is run, here or where the table says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ctm_fast.training import preset
from tests.golden import Golden

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

ELSEWHERE = {
    "make demo": "test_make_demo below (long)",
    "make test": "what continuous integration runs",
    "pip install torch==2.13.0": "test_build.py (long) and the Makefile's set-up",
    "pip install -e .": "test_build.py (long) and the Makefile's set-up",
    "pytest benchmarks/ --benchmark-only": "test_benchmarks below (long)",
    "make gpu": "tests/benchmarks/test_gpu.py, its stages one by one",
    "torchrun --nproc-per-node=8 -m ctm_fast.train --preset cifar10-cond --data cifar10.zip --compile": (
        "tests/training/test_ranks.py, on two ranks; its preset in tests/training/test_presets.py"
    ),
    "torchrun --nproc-per-node=8 -m ctm_fast.sample --network F --seeds 0-49999 --out samples.npz": (
        "tests/test_sample_ranks.py, on two ranks"
    ),
}
TINY = ["--set", "teacher.steps=4", "--set", "ctm.steps=4", "--set", "teacher.batch=8", "--set", "ctm.batch=8"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's reader is, after a training run of a few steps in ``runs/00000-digits``."""
    path = tmp_path_factory.mktemp("readme")
    run("python -m ctm_fast.train", path, *TINY)
    return path


def run(command: str, cwd: Path, *more: str) -> str:
    words = shlex.split(command.replace("ctm-000400", "ctm-000004"))
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words[1:], *more], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_each_command_is_run_somewhere() -> None:
    assert preset("digits").ctm.steps == 400, "the snapshot that README.md names"
    for command in commands():
        assert command in ELSEWHERE or command.startswith("python -m ctm_fast."), f"nothing runs `{command}`"
    assert set(ELSEWHERE) <= set(commands()), "a command of the table is no longer in README.md"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m ctm_fast.")])
def test_command(command: str, directory: Path) -> None:
    if "ctm_fast.train" not in command:
        run(command, directory)
    elif "--dry-run" in command:
        assert '"steps": 800' in run(command, directory)
    elif "fashion-mnist" in command:
        if not Path("/usr/share/datasets/fashion-mnist").exists():
            pytest.skip("Debian's dataset-fashion-mnist is not installed")
        run(command, directory, *TINY)
    else:
        run(command, directory, *TINY, "--seed", "3")


def test_python(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    sampling, networks = blocks("python")
    names: dict[str, object] = {}
    exec(sampling.replace("ctm-000400", "ctm-000004"), names)  # README's own lines
    assert len(names["images"]) == 64  # type: ignore[arg-type]
    names = {"tensors": Golden("edm/edm_ncsnpp_uncond.npz").tensors("w")}
    exec(networks, names)
    assert "model.map_layer0_s.weight" in names["tensors"]  # type: ignore[operator]


@pytest.mark.long
def test_make_demo(tmp_path: Path) -> None:
    """From a fresh clone, as a newcomer does."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    subprocess.run(["make", "demo"], cwd=tmp_path / "clone", check=True)
    assert (tmp_path / "clone/runs/00000-digits/report.md").exists()


@pytest.mark.long
def test_benchmarks() -> None:
    subprocess.run([sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only"], cwd=ROOT, check=True)
