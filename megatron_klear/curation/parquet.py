"""Lines of JSON as a Parquet file, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import DataError

_BATCH_ROWS = 1024


def write_parquet(lines: Path, output: Path) -> None:
    """Write rows of the JSONL file `lines` as Parquet; columns are those of all rows, absent keys nulls.

    Where one column has whole numbers and fractions, all become fractions. Raises DataError where a column has values
    of several types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.schema([])
        for rows in _batches(lines):
            found = pa.schema(list(pa.array(rows).type))
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with pq.ParquetWriter(output, schema) as writer:
            for rows in _batches(lines):
                array = pa.array(rows, type=pa.struct(list(schema)))
                writer.write_batch(pa.RecordBatch.from_struct_array(array))
    except pa.ArrowException as error:
        raise DataError(f"the rows do not fit one Parquet schema ({error}); write .jsonl") from None


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    with lines.open("rb") as stream:
        while rows := [json.loads(line) for line in islice(stream, _BATCH_ROWS)]:
            yield rows
