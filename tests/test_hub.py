"""Models in folders and on the Hub through huggingface_hub, without a network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants

from ctm_fast import hub
from ctm_fast.errors import CheckpointError
from ctm_fast.models import CTM, EDMDenoiser, load_model
from tests.command_line import tree
from tests.snapshots import save_snapshot

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _assert_same(model: CTM | EDMDenoiser, expected: CTM | EDMDenoiser) -> None:
    assert type(model) is type(expected)
    assert model.sigma_data == expected.sigma_data
    weights = model.state_dict()
    assert list(weights) == list(expected.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("kind", [CTM, EDMDenoiser])
def test_folder(kind: type[CTM] | type[EDMDenoiser], tmp_path: Path) -> None:
    model, metadata = load_model(save_snapshot(tmp_path / "a.safetensors", kind))
    metadata["licence"] = "CC BY-NC-SA 4.0"
    hub.save_pretrained(model, tmp_path / "folder", metadata)
    assert sorted(tree(tmp_path / "folder")) == ["README.md", "config.json", "model.safetensors"]
    loaded, got = hub.from_pretrained(tmp_path / "folder")
    _assert_same(loaded, model)
    assert not loaded.training
    assert got == metadata
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["kind"] == kind.__name__
    assert config["network"]["model_channels"] == 8
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "library_name: ctm_fast" in card
    assert "Licence of the weights: CC BY-NC-SA 4.0." in card
    hub.save_pretrained(loaded, tmp_path / "again", got)
    assert tree(tmp_path / "again") == tree(tmp_path / "folder")


def test_folder_without_a_config(tmp_path: Path) -> None:
    """The weights are enough."""
    save_snapshot(tmp_path / "model.safetensors", CTM)
    _assert_same(hub.from_pretrained(str(tmp_path))[0], load_model(tmp_path / "model.safetensors")[0])


def test_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded is the folder; what was downloaded before is loaded from the cache."""
    model, metadata = load_model(save_snapshot(tmp_path / "a.safetensors", CTM))
    uploaded: dict[str, bytes | None] = {}

    class Made:
        repo_id = "user/name"

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        assert repo_id == "user/name"
        assert options["commit_message"] == "one step"
        uploaded.update(tree(folder_path))
        return "https://huggingface.co/user/name/commit/0"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Made)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    address = hub.push_to_hub(model, "user/name", metadata, commit_message="one step")
    assert address == "https://huggingface.co/user/name/commit/0"
    hub.save_pretrained(model, tmp_path / "folder", metadata)
    assert uploaded == tree(tmp_path / "folder")

    snapshot = tmp_path / "cache" / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, content in uploaded.items():
        (snapshot / name).write_bytes(content or b"")
    (tmp_path / "cache" / "models--user--name" / "refs").mkdir()
    (tmp_path / "cache" / "models--user--name" / "refs" / "main").write_text("0" * 40)
    loaded, got = hub.from_pretrained("user/name", cache_dir=tmp_path / "cache")
    _assert_same(loaded, model)
    assert got == metadata


@pytest.mark.parametrize("place", ["no/such", "not a repository", "user/name/more"])
def test_refused_places(place: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{place}: expected a folder or a repository of the Hub"):
        hub.from_pretrained(place, cache_dir=tmp_path)


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a \.safetensors file, got no such file"):
        hub.from_pretrained(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="got a pickle, which is never loaded"):
        hub.from_pretrained(tmp_path)
    for config in ("{", "[1]", '{"__init__": 1, "metadata": 3'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=f"^{tmp_path}: expected a folder or a repository of the Hub"):
            hub.from_pretrained(tmp_path)


def test_without_the_extra(tmp_path: Path) -> None:
    """The models do without it; the module that needs it says what to install."""
    code = """
import sys
sys.modules["huggingface_hub"] = None
import ctm_fast.models, ctm_fast.sample, ctm_fast.train
assert not [name for name in sys.modules if name.startswith("huggingface_hub.")]
try:
    import ctm_fast.hub
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ctm_fast.hub needs huggingface_hub: pip install ctm_fast[hub]")
