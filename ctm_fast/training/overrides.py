"""``--set a.b=c``: a configuration with some of its keys changed."""

import dataclasses
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from ctm_fast.errors import ConfigError, LevelError
from ctm_fast.training.config import RunConfig, check_sizes, leaves, nearest, to_dict

_FILLED_IN = {
    "preset": "--preset chooses",
    "data_sha256": "the run fills in",
    "teacher_sha256": "the run fills in",
    "student_sha256": "the run fills in",
}


def override(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """``config`` with each ``a.b=value`` applied, all at once; values are read by the type of the key.

    Raises ConfigError naming the key, and the nearest one if there is none such.
    """
    tree = to_dict(config)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set: expected key=value, got {assignment!r}")
        _assign(tree, config, key, text)
    changed: RunConfig = _build(RunConfig, tree, "")
    check_sizes(changed.network)
    return changed


def _assign(tree: dict[str, Any], config: Any, key: str, text: str) -> None:
    if key in _FILLED_IN:
        raise ConfigError(f"--set {key}: expected a key to be set, got one that {_FILLED_IN[key]}")
    node, owner, parts = tree, config, key.split(".")
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            raise ConfigError(f"--set {key}: unknown key; {nearest(key, _keys(tree))}")
        node, owner = node[part], getattr(owner, part)
    name = parts[-1]
    if name not in node:
        raise ConfigError(f"--set {key}: unknown key; {nearest(key, _keys(tree))}")
    if isinstance(node[name], dict):
        raise ConfigError(f"--set {key}: expected a key of this section, such as {key}.{next(iter(node[name]))}")
    node[name] = _parse(key, text, get_type_hints(type(owner))[name])


def _parse(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(kind) is tuple:
            return [get_args(kind)[0](item) for item in text.strip("()[]").split(",") if item.strip()]
        return kind(text)
    except (ValueError, KeyError) as error:
        name = "comma-separated integers" if get_origin(kind) is tuple else kind.__name__
        raise ConfigError(f"--set {key}: expected {name}, got {text!r}") from error


def _build(cls: Any, tree: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"{path}{key}: unknown key; {nearest(key, hints)}")
    values = {}
    for key, value in tree.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value, f"{path}{key}.")
        else:
            values[key] = tuple(value) if get_origin(kind) is tuple else value
    try:
        return cls(**values)
    except LevelError as error:
        raise ConfigError(f"{path}{error}") from error


def _keys(tree: dict[str, Any]) -> list[str]:
    return [key for key, _ in leaves(tree)]
