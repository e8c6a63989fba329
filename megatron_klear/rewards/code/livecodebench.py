"""Rows of LiveCodeBench's data: public tests, and private ones that are a compressed pickle."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any

_MAX_BYTES = 1 << 30  # unpacked; the largest row holds some hundred megabytes


class PackedTestsError(ValueError):
    """Private tests that cannot be read; the message says why."""


class _OnlyText(pickle.Unpickler):
    """Reads a pickle of plain data: no class and no function comes out of it."""

    def find_class(self, module: str, name: str) -> Any:
        raise PackedTestsError(f"their pickle names {module}.{name}; plain text alone is read")

    def persistent_load(self, pid: Any) -> Any:
        raise PackedTestsError("their pickle refers to something outside of it")


def unpack_tests(packed: str) -> list[Any]:
    """The private tests: JSON, or JSON in a pickle, compressed with zlib, in base64. Raises PackedTestsError."""
    try:
        found = json.loads(packed)
    except ValueError:
        found = _unpickle(packed)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise PackedTestsError(f"they are no JSON ({error})") from None
    if not isinstance(found, list):
        raise PackedTestsError(f"they are of type {type(found).__name__}, expected a list")
    return found


def _unpickle(packed: str) -> str:
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(packed, validate=True), _MAX_BYTES)
        if unpacking.unconsumed_tail:
            raise PackedTestsError(f"they are larger than {_MAX_BYTES >> 20} MiB")
        text = _OnlyText(io.BytesIO(content)).load()
    except PackedTestsError:
        raise
    except (binascii.Error, zlib.error, ValueError) as error:
        raise PackedTestsError(f"they are neither JSON nor base64 of compressed data ({error})") from None
    except Exception as error:  # whatever a broken pickle raises
        raise PackedTestsError(f"their pickle is broken ({type(error).__name__}: {error})") from None
    if not isinstance(text, str):
        raise PackedTestsError(f"their pickle holds {type(text).__name__}, expected a text")
    return text
