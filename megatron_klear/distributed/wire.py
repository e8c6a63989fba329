"""Values as the bytes that cross between processes: a head, and large arrays beside it that nobody copies."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

_LEAST_BYTES = 1 << 16
"""Of an array that goes beside the head; what is smaller costs less within it than as a message of its own."""


def taken_apart(value: Any) -> tuple[bytes, list[memoryview]]:
    """A pickle of the value and the bytes of its large arrays, which are the arrays' own memory (PEP 574)."""
    beside: list[memoryview] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _LEAST_BYTES:
            return True
        beside.append(raw)
        return False

    return pickle.dumps(value, protocol=5, buffer_callback=stays), beside


def put_together(head: Any, beside: Iterable[Any]) -> Any:
    """The value; its large arrays lie in the buffers of `beside`, read-only where they were so when taken apart."""
    return pickle.loads(head, buffers=beside)
