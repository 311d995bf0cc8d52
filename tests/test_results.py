"""docs/results: the commands of its index are understood, and its pages are there, whole, and tell of this package."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from ctm_fast import train
from ctm_fast.experiments import EXPERIMENTS
from ctm_fast.experiments import __main__ as experiments
from ctm_fast.training import preset
from tests.command_line import call

RESULTS = Path(__file__).parent.parent / "docs" / "results"
INDEX = (RESULTS / "README.md").read_text()


def commands() -> list[str]:
    found = [line for block in re.findall(r"```bash\n(.*?)```", INDEX, re.DOTALL) for line in block.splitlines()]
    return [*found, *re.findall(r"`(python -m [^`]+)`", INDEX)]


@pytest.mark.parametrize("command", commands())
def test_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training up to its configuration; of what takes data, weights, GPUs or an hour, the arguments."""
    monkeypatch.chdir(tmp_path)
    module, *words = shlex.split(command.partition(" -m ")[2])
    if module == "ctm_fast.train":
        assert call(train.main, [*words, "--device", "cpu", "--dry-run"], monkeypatch, capsys)[0] == 0
    elif module == "ctm_fast.experiments":
        arguments = experiments._parser().parse_args(words)
        assert arguments.name in EXPERIMENTS
        assert preset(arguments.preset)
    else:
        importlib.import_module(module)._parser().parse_args(words)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_page(path: Path) -> None:
    """Page, picture and record belong together, and the index names the page."""
    record = json.loads(path.read_text())
    page = path.with_suffix(".md").read_text()
    assert record["command"] in page
    assert record["made"]["commit"] in page
    assert f"({path.stem}.png)" in page
    assert path.with_suffix(".png").exists()
    assert f"({path.stem}.md)" in INDEX


def test_every_experiment_has_a_page() -> None:
    assert {path.stem.removesuffix("-digits") for path in RESULTS.glob("*-digits.json")} == set(EXPERIMENTS)
