"""The elements of a .json file that holds one list, read as they come."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_klear.data.rows import DataError

_READ_BYTES = 1 << 20
_SPACE = " \t\r\n"
_SCAN = json.JSONDecoder().raw_decode


def begins_a_list(path: Path) -> bool:
    """Whether the first character of a file, after white space, is a bracket."""
    with path.open("rb") as stream:
        return stream.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def list_elements(path: Path, max_row_bytes: int) -> Iterator[bytes]:
    """The JSON of each element, byte for byte but for line ends between its tokens, which become spaces.

    Holds no more of the file than the longest element and two megabytes. Raises DataError where the list is broken
    or an element is longer than `max_row_bytes`: where the next one begins is not known then.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    with path.open("rb") as stream:
        text, at, number, ended, wanted = "", 0, 0, False, _READ_BYTES
        while True:
            at = _past_space(text, at)
            if number == 0 and text[at : at + 1] == "[":
                at, number = at + 1, 1
                continue
            if number and text[at : at + 1] == "]":
                _check_end(path, number, text[at + 1 :] + decode(stream.read(_READ_BYTES)))
                return
            end, next_at = _element(text, at) if number else (0, 0)
            if end:
                element = text[at:end].encode("utf-8", "surrogateescape")
                yield b" ".join(part.strip() for part in element.splitlines())
                at, number, wanted = next_at, number + 1, _READ_BYTES
                continue
            if ended or len(text) - at > max_row_bytes + _READ_BYTES:
                raise DataError(f"{path}: row {number} is no valid JSON, or longer than {max_row_bytes} bytes")
            more = stream.read(wanted)
            text, at, ended, wanted = text[at:] + decode(more, not more), 0, not more, 2 * wanted


def _element(text: str, at: int) -> tuple[int, int]:
    """Where the element at `at` ends and the next one begins; zeros where more has to be read to know."""
    try:
        _, end = _SCAN(text, at)
    except (ValueError, RecursionError):
        return 0, 0
    after = _past_space(text, end)
    if text[after : after + 1] == ",":
        return end, after + 1
    return (end, after) if text[after : after + 1] == "]" else (0, 0)


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _check_end(path: Path, number: int, rest: str) -> None:
    if rest.strip():
        raise DataError(f"{path}: more follows the list; expected one list")
    if number == 1:
        raise DataError(f"{path} is an empty list")
