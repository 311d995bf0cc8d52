"""``FILE.parquet``, the form of the Hugging Face Hub: an image column struct{bytes, path}, and a column ``label``.

Needs the extra ``data``: ``pip install ctm_fast[data]``. Without it, importing this module raises ImportError.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctm_fast.data.checks import named, reading
from ctm_fast.data.images import ImageFile, ImageFiles
from ctm_fast.errors import DataError

try:
    import pyarrow
    from pyarrow.parquet import ParquetFile
except ImportError as error:
    raise ImportError(f"parquet files need pyarrow: pip install ctm_fast[data] ({error})") from error

_ROWS = 64  # read at once
_LABEL = "label"


@contextlib.contextmanager
def open_parquet(path: Path, shards: Sequence[Path], *, labels: bool) -> Iterator[ImageFiles]:
    """The rows of ``shards``, one after another. Raises DataError."""
    with contextlib.ExitStack() as stack:
        tables = []
        for shard in shards:
            with reading(shard):
                tables.append((shard, stack.enter_context(ParquetFile(shard, memory_map=False))))
        columns = [_image_column(shard, table.schema_arrow) for shard, table in tables]
        classes = [_labels(shard, table) for shard, table in tables] if labels else None
        files = (
            file
            for (shard, table), column in zip(tables, columns, strict=True)
            for file in _rows(shard, table, column, f"{shard.name}: " if len(shards) > 1 else "")
        )
        count = sum(table.metadata.num_rows for _, table in tables)
        if count == 0:
            raise DataError(f"data: {path}: expected at least one image, got none")
        yield ImageFiles(path, count, files, None if classes is None else np.concatenate(classes))


def _image_column(shard: Path, schema: Any) -> str:
    found = [
        field.name
        for field in schema
        if pyarrow.types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and pyarrow.types.is_binary(field.type.field("bytes").type)
    ]
    if len(found) != 1:
        got = named(found) if found else f"columns {named(schema.names) or 'none'}"
        raise DataError(f"data: {shard}: expected one column of struct{{bytes, path}}, got {got}")
    return str(found[0])


def _labels(shard: Path, table: Any) -> Any:
    schema = table.schema_arrow
    if _LABEL not in schema.names:
        raise DataError(f"labels: {shard}: expected a column {_LABEL}, got {named(schema.names)}")
    kind = schema.field(_LABEL).type
    if not pyarrow.types.is_integer(kind):
        raise DataError(f"labels: {shard}: expected integers, got a column of {kind}")
    with reading(shard):
        column = table.read(columns=[_LABEL], use_threads=False).column(_LABEL)
    if column.null_count:
        raise DataError(
            f"labels: {shard}: expected a label for each of {len(column)} images, got {column.null_count} nulls"
        )
    return column.to_numpy()


def _rows(shard: Path, table: Any, column: str, prefix: str) -> Iterator[ImageFile]:
    row, rows = 0, table.metadata.num_rows
    with reading(shard):
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False):
            if row + len(batch) > rows:
                raise ValueError(f"expected {rows} rows, got more")
            for value in batch.column(0):
                content = value.as_py()
                yield _image(f"{prefix}row {row}", None if content is None else content["bytes"])
                row += 1
        if row != rows:
            raise ValueError(f"expected {rows} rows, got {row}")


def _image(name: str, content: bytes | None) -> ImageFile:
    def read() -> bytes:
        if content is None:
            raise ValueError("expected its bytes in the file, got null")
        return content

    return ImageFile(name, read)
