"""Command lines called in this process, and what they leave behind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ctm_fast import runtime

Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Every path below ``folder`` and the contents of the files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def call(
    main: Callable[[], None], argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``main`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    capsys.readouterr()
    code = 0
    try:
        runtime.run(main)
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def assert_refused(result: tuple[int, str, str], names: str, *parts: str) -> None:
    """Exit code 2 and one line that begins with the argument's name and holds ``parts``."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {names}"), err
    for part in parts:
        assert part in err, err
