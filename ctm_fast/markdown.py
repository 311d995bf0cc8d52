"""Tables in Markdown, in columns that line up as plain text too."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], words: int = 0) -> str:
    """The first row is the head, the column ``words`` text, the others numbers. Raises ValueError for uneven rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruler = ["-" * (width - 1) + ":" for width in widths]
    ruler[words] = "-" * widths[words]
    lines = []
    for row in (rows[0], ruler, *rows[1:]):
        cells = [*map(str.rjust, row, widths)]
        cells[words] = row[words].ljust(widths[words])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
