"""Tables in Markdown."""

import pytest

from ctm_fast.markdown import table


def test_columns_line_up() -> None:
    assert table([["name", "x"], ["a", "1.5"], ["longer", ""]]).splitlines() == [
        "| name   |   x |",
        "| ------ | --: |",
        "| a      | 1.5 |",
        "| longer |     |",
    ]


def test_uneven_rows() -> None:
    with pytest.raises(ValueError, match="argument"):
        table([["name", "x"], ["a"]])
