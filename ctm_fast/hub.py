"""Models on the Hugging Face Hub, or in a folder laid out as there: ``model.safetensors``, ``config.json``, a card.

Needs the extra ``hub``: ``pip install ctm_fast[hub]``. Without it, importing this module raises ImportError; no other
module imports it; :func:`ctm_fast.serving.load` takes the same folders and repositories. ``model.safetensors`` alone
describes the model; ``config.json`` is for readers and for the Hub.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctm_fast.errors import CheckpointError, reason
from ctm_fast.models import CTM, EDMDenoiser, load_model, save_model
from ctm_fast.models.repository import WEIGHTS, download

try:
    from huggingface_hub import ModelCard, ModelHubMixin
except ImportError as error:
    raise ImportError(f"ctm_fast.hub needs huggingface_hub: pip install ctm_fast[hub] ({error})") from error

_CARD = """---
{{ card_data }}
---

{{ kind }} of [Consistency Trajectory Models](https://arxiv.org/abs/2310.02279), for `ctm_fast.hub.from_pretrained`.

Licence of the weights: {{ licence }}.
"""


def from_pretrained(folder_or_repo: str | Path, **options: Any) -> tuple[CTM | EDMDenoiser, dict[str, Any]]:
    """The model in a folder or a repository of the Hub, in eval mode, and its metadata, as :func:`load_model` has them.

    Args:
        folder_or_repo: a folder, for which no network is used, or ``user/name``.
        options: of huggingface_hub's ``ModelHubMixin.from_pretrained``: revision, cache_dir, token, local_files_only...

    Raises CheckpointError naming it if it holds no model of ctm_fast, is not there or cannot be reached.
    """
    try:
        loaded = _HubModel.from_pretrained(folder_or_repo, **options)
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such repository, or a config.json that may be anything
        raise CheckpointError(
            f"{folder_or_repo}: expected a folder or a repository of the Hub: {reason(error)}"
        ) from error
    return loaded.model, loaded.metadata


def save_pretrained(model: CTM | EDMDenoiser, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write ``model`` into ``folder``, as :func:`from_pretrained` reads it.

    ``metadata`` is any JSON. That of :func:`from_pretrained` or :func:`ctm_fast.models.load_model` holds the licence
    and source of the weights: pass it on.
    """
    holder = _HubModel(model, metadata or {})
    holder.save_pretrained(folder, config=holder.config)


def push_to_hub(model: CTM | EDMDenoiser, repo: str, metadata: Mapping[str, Any] | None = None, **options: Any) -> str:
    """Upload what :func:`save_pretrained` writes to ``repo``, made if it is not there; the address of the commit.

    Args:
        model: its weights are uploaded as they are.
        repo: ``user/name``.
        metadata: as :func:`save_pretrained` takes it.
        options: of huggingface_hub's ``ModelHubMixin.push_to_hub``: private, token, branch, commit_message...
    """
    holder = _HubModel(model, metadata or {})
    return holder.push_to_hub(repo, config=holder.config, **options)


class _HubModel(ModelHubMixin, library_name="ctm_fast", model_card_template=_CARD):
    """A model and its metadata, as huggingface_hub saves, loads and uploads them."""

    def __init__(self, model: CTM | EDMDenoiser, metadata: Mapping[str, Any]) -> None:
        self.model = model
        self.metadata = dict(metadata)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "kind": type(self.model).__name__,
            "network": asdict(self.model.net.config),
            "sigma_data": self.model.sigma_data,
            "licence": self.metadata.get("licence"),
        }

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        licence = self.metadata.get("licence", "that of whoever trained the model")
        return super().generate_model_card(*args, kind=type(self.model).__name__, licence=licence, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        metadata = {key: value for key, value in self.metadata.items() if key != "network"}  # the file has its own
        save_model(save_directory / WEIGHTS, self.model, self.model.net.config, metadata)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "_HubModel":
        folder = Path(model_id)
        path = folder / WEIGHTS if folder.is_dir() else download(model_id, **options)
        return cls(*load_model(path))
