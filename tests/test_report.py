"""The report tells what serves, as it is, and a reason for every kernel that does not."""

import json

import pytest

from ctm_fast import _libraries, ops, report
from ctm_fast.ops import _library


def test_the_table_is_what_serves_and_nothing_is_left_unexplained() -> None:
    values = report.report()
    assert set(ops.__all__) & set(_library.SERVES["cpu", False]) <= set(values["ops"])
    for op, row in values["ops"].items():
        for where, (device, compiling) in report.WHERE.items():
            cell = row[where]
            assert cell["kernel"] == ops.serving(op, device, compiling=compiling)
            assert {cell["kernel"], *cell["why_not"]} | {"reference"} == {"reference", *_library._cells[op]}
            assert all(cell["why_not"].values())


def test_a_library_is_loaded_or_has_a_reason() -> None:
    for device, file in _libraries.FILES.items():
        state = report.report()["libraries"][file]
        assert (state == "loaded") == (_libraries.missing(device) is None)
        assert state == "loaded" or len(state) > len("not loaded: ")


def test_a_forced_kernel_is_said_to_be_forced() -> None:
    with ops.use_reference():
        cells = report.report()["ops"]["precond_combine"]
    assert cells["cpu"]["kernel"] == "reference"
    if _libraries.missing("cpu") is None:
        assert cells["cpu"]["why_not"]["cpp"] == "reference is forced"


def test_both_forms_print(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["report", "--json"])
    report.main()
    assert json.loads(capsys.readouterr().out) == report.report()
    monkeypatch.setattr("sys.argv", ["report"])
    report.main()
    text = capsys.readouterr().out
    for word in ("machine", "versions", "libraries", "which kernel serves", "precond_combine", "and why not another"):
        assert word in text
