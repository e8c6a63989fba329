"""The items that a decontamination looks for, templates cut out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_klear.data.rows import DataError

from .grams import Item
from .rows import BadRow, Unusable, benchmark_text, decode, stream_chunks
from .text import words


@dataclass(frozen=True, slots=True)
class Template:
    """A text that a benchmark's file puts around its problems, and how many items had it."""

    path: Path
    words: tuple[str, ...]


def read_templates(paths: Sequence[Path]) -> list[Template]:
    """Read one template a file, the longest first, so that none hides another that holds it.

    Raises DataError where a file cannot be read or has no word.
    """
    templates = []
    for path in paths:
        try:
            found = tuple(words(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--template {path} cannot be read as UTF-8 text: {error}") from None
        if not found:
            raise DataError(f"--template {path} has no letters or digits")
        templates.append(Template(path, found))
    return sorted(templates, key=lambda template: -len(template.words))


def read_items(files: Sequence[Path], templates: Sequence[Template], max_row_bytes: int) -> list[Item]:
    """Read all items of the benchmark files.

    A row that cannot be used is an error here: an item that is left out would be missed without a sign. Raises
    DataError for it, for an item without words, and for a template that no item has.
    """
    items, used = [], set()
    for path in files:
        for chunk in stream_chunks(path, max_row_bytes):
            for row in decode(chunk, max_row_bytes):
                where = chunk.where(row.number)
                if isinstance(row, Unusable):
                    raise DataError(f"--against {where}: {row.reason}; every item must be readable")
                try:
                    text = benchmark_text(row.value)
                except BadRow as error:
                    raise DataError(f"--against {where}: {error}; every item must be readable") from None
                segments = [tuple(words(text))]
                for template in templates:
                    cut = [part for segment in segments for part in _cut(segment, template.words)]
                    if cut != segments:
                        used.add(template.path)
                    segments = cut
                if not any(segments):
                    raise DataError(f"--against {where}: nothing but templates, or no letters and digits")
                items.append(Item({"file": str(path), "row": row.number}, tuple(filter(None, segments))))
    if not items:
        raise DataError("--against: the files have no item")
    if unused := [template.path for template in templates if template.path not in used]:
        raise DataError(f"--template {unused[0]}: no benchmark item has this text; its words must follow each other")
    return items


def _cut(segment: tuple[str, ...], template: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What stands before, between and after the template."""
    size, begin, at = len(template), 0, 0
    while at + size <= len(segment):
        if segment[at] == template[0] and segment[at : at + size] == template:
            yield segment[begin:at]
            begin = at = at + size
        else:
            at += 1
    yield segment[begin:]
