"""EDM's pickled modules as data: their state dict, and what they were built with."""

from collections.abc import Iterator
from typing import Any

from ctm_fast.errors import CheckpointError
from ctm_fast.models.published.names import ModuleRecord
from ctm_fast.models.published.pickles import shown
from ctm_fast.models.published.tensors import StoredTensor

_MAX_DEPTH = 32
_MAX_VALUES = 10_000

# What EDM's classes take for an argument that was not given.
_NETWORKS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "dropout": 0.1,
        "label_dropout": 0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
        "augment_dim": 0,
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
        "dropout": 0.1,
        "label_dropout": 0,
        "augment_dim": 0,
    },
}
_WRAPPER = {"img_resolution": None, "img_channels": None, "label_dim": 0, "sigma_data": 0.5}
_OF_THE_WRAPPER = {"img_resolution", "in_channels", "out_channels", "label_dim"}


def state_dict(module: ModuleRecord) -> dict[str, StoredTensor]:
    """Name -> parameter or persistent buffer of ``module`` and all in it, named and ordered as torch does."""
    state: dict[str, StoredTensor] = {}
    for prefix, inner in _walk(module):
        hidden = _attribute(inner, "_non_persistent_buffers_set", set)
        for kind in ("_parameters", "_buffers"):
            for name, value in _attribute(inner, kind, dict).items():
                if isinstance(value, StoredTensor) and name not in hidden:
                    state[f"{prefix}{name}"] = value
                elif value is not None and name not in hidden:
                    raise CheckpointError(f"{shown(f'{prefix}{name}')} is no tensor, but a {type(value).__name__}")
    return state


def edm_config(module: ModuleRecord) -> dict[str, Any]:
    """What an ``EDMPrecond`` was built with: its own arguments, and under ``network`` those of the network in it.

    Raises CheckpointError for any other model: EDM2's networks, or other preconditioning than EDM's.
    """
    classes = {inner.class_name for _, inner in _walk(module)}
    if module.class_name == "Precond" or any(name.startswith("MP") for name in classes):
        found = ", ".join(sorted({module.class_name, *(name for name in classes if name.startswith("MP"))}))
        raise CheckpointError(f"holds a network of EDM2 ({shown(found)}), which is not supported")
    network = _attribute(module, "_modules", dict).get("model")
    if (
        module.class_name != "EDMPrecond"
        or not isinstance(network, ModuleRecord)
        or network.class_name not in _NETWORKS
    ):
        inner = network.class_name if isinstance(network, ModuleRecord) else "nothing"
        raise CheckpointError(
            f"expected an EDMPrecond of a {' or '.join(_NETWORKS)}, got {shown(f'{module.class_name} of {inner}')}"
        )
    given = {**_arguments(module), **(module.attributes or {})}
    sizes = {name: _plain(given.get(name, default)) for name, default in _WRAPPER.items()}
    inner_arguments = {key: value for key, value in _arguments(network).items() if key not in _OF_THE_WRAPPER}
    return {
        "network": {"model_type": network.class_name, **_NETWORKS[network.class_name], **_plain(inner_arguments)},
        **sizes,
        "precond": module.class_name,
    }


def _walk(module: ModuleRecord) -> Iterator[tuple[str, ModuleRecord]]:
    """``module`` and all modules in it with the prefix of their names. Each may be in one place only."""
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        prefix, inner = waiting.pop()
        if id(inner) in seen or prefix.count(".") > _MAX_DEPTH:
            raise CheckpointError(f"its module {shown(prefix)} is in two places, or in itself")
        seen.add(id(inner))
        yield prefix, inner
        children = _attribute(inner, "_modules", dict)
        for name, child in reversed(children.items()):
            if isinstance(child, ModuleRecord):
                waiting.append((f"{prefix}{name}.", child))
            elif child is not None:
                raise CheckpointError(f"its module {shown(f'{prefix}{name}')} is none, but a {type(child).__name__}")


def _attribute(module: ModuleRecord, name: str, kind: type) -> Any:
    value = (module.attributes or {}).get(name, kind())
    if not isinstance(value, kind):
        raise CheckpointError(f"{shown(module.class_name)}.{name} is no {kind.__name__}, but a {type(value).__name__}")
    return value


def _arguments(module: ModuleRecord) -> dict[str, Any]:
    positional = (module.attributes or {}).get("_init_args", [])
    if positional not in ([], ()):
        raise CheckpointError(f"a {shown(module.class_name)} built with arguments without names")
    return _attribute(module, "_init_kwargs", dict)


def _plain(value: Any) -> Any:
    """``value``, if it is as JSON has it. A list that holds a list twice, and so on, is exponentially large."""
    waiting, count = [value], 0
    while waiting:
        count += 1
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        elif not isinstance(item, str | int | float | None):
            raise CheckpointError(f"a network built with a {type(item).__name__}")
        if count > _MAX_VALUES:
            raise CheckpointError("a network built with more arguments than any has")
    return value
