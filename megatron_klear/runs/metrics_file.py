"""Append-only JSON lines that survive a kill: one object a step, never two for the same one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_klear.config.files import write_text_atomically

Values = Mapping[str, float | int | bool]


class MetricsFile:
    """A `*.jsonl` of one object a step, each written with a single append.

    Opened at step k of a resumed run, lines of later steps and a line torn by a kill are removed first, by a new file
    that replaces the old one: those steps will be written again. All of them where there is nothing to resume from.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _rewind(path, resume_step)
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, values: Values) -> None:
        """Append one object. Non-finite numbers become null. Raises OSError naming the file when the disk is full."""
        line = json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()}) + "\n"
        data = line.encode()
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self.path)) from None
        if written != len(data):
            raise OSError(28, "cannot write metrics: the disk is full", str(self.path))

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _rewind(path: Path, step: int) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if step > 0 and _is_kept(line, step))
    if kept != text:
        write_text_atomically(path, kept)


def _is_kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return line.endswith("\n") and isinstance(record, dict) and record.get("step", math.inf) <= step


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
