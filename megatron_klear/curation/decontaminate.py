"""Drop rows whose problem overlaps with a benchmark's, and say of each where, with what, and how common that is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_klear.data.sources import Chunk

from .grams import GramIndex
from .report import Judged
from .rows import BadRow, Row, Unusable, decode, problem_text, stream_chunks
from .rules import Rule
from .text import words
from .workers import ordered_map

_MOST_COMMON = 25
_SHOWN_WORDS = 60
REASON = "contaminated"


@dataclass(frozen=True, slots=True)
class Scanned:
    """The rows of a chunk, judged, and in how many of them each gram occurs."""

    rows: list[Judged]
    documents: Counter[int]


@dataclass(frozen=True, slots=True)
class Scanner:
    """What a worker needs to judge chunks."""

    index: GramIndex
    rule: Rule
    max_row_bytes: int

    def __call__(self, chunk: Chunk) -> Scanned:
        """Judge the rows of a chunk."""
        judged: list[Judged] = []
        usable: list[tuple[int, Row, str]] = []
        for row in decode(chunk, self.max_row_bytes):
            if isinstance(row, Unusable):
                judged.append(Judged(row.number, reason=row.kind, bad=True, details={"why": row.reason}))
                continue
            try:
                usable.append((len(judged), row, problem_text(row.value)))
                judged.append(Judged(row.number, row.line))
            except BadRow as error:
                judged.append(Judged(row.number, reason=error.kind, bad=True, details={"why": str(error)}))
        documents: Counter[int] = Counter()
        for which, match in self.index.scan([text for _, _, text in usable]).items():
            documents.update(set(match.grams))
            place, row, text = usable[which]
            if (hit := self.rule.hit(self.index, match)) is not None:
                begin, end = hit["span"]
                shown = words(text)[begin : min(end, begin + _SHOWN_WORDS)]
                details = {**hit, "text": " ".join(shown) + (" ..." if end - begin > _SHOWN_WORDS else "")}
                judged[place] = Judged(row.number, reason=REASON, details=details)
        return Scanned(judged, documents)


@dataclass(slots=True)
class Decontamination:
    """A pass over files; `documents` counts the rows that have each gram, and is whole once the pass is."""

    scanner: Scanner
    workers: int
    documents: Counter[int] = field(default_factory=Counter)

    def run(self, files: list[Path], hits: IO[bytes]) -> Iterator[tuple[Path, Judged]]:
        """Judge all rows in order and write a line for each that is dropped; memory does not grow with the rows.

        Raises DataError where a file cannot be read.
        """
        chunks = ((path, chunk) for path in files for chunk in stream_chunks(path, self.scanner.max_row_bytes))
        for (path, _), scanned in ordered_map(self._scan, chunks, self.workers):
            self.documents.update(scanned.documents)
            for judged in scanned.rows:
                if judged.reason == REASON:
                    hit = {"file": str(path), "row": judged.number, **judged.details}
                    hits.write(json.dumps(hit, ensure_ascii=False).encode() + b"\n")
                yield path, judged

    @property
    def _scan(self) -> _OfPath:
        return _OfPath(self.scanner)

    def finish(self, hit: dict[str, Any]) -> dict[str, Any]:
        """A hit with its gram in words, and how many problems of the benchmarks and rows of the corpus have it."""
        return {**hit, "gram": self._gram(hit["gram"])}

    def finish_hits(self, raw: Path, finished: Path) -> None:
        """Finish every line of the file `raw`."""
        with raw.open("rb") as lines, finished.open("wb") as stream:
            for line in lines:
                stream.write(json.dumps(self.finish(json.loads(line)), ensure_ascii=False).encode() + b"\n")

    def common_grams(self) -> list[dict[str, Any]]:
        """The grams that most rows have: where phrases show."""
        ranked = sorted(self.documents.items(), key=lambda entry: (-entry[1], entry[0]))
        return [self._gram(gram) for gram, _ in ranked[:_MOST_COMMON]]

    def _gram(self, gram: int) -> dict[str, Any]:
        index = self.scanner.index
        return {
            "text": " ".join(index.texts[gram]),
            "benchmark_items": index.num_families[gram],
            "documents": self.documents[gram],
        }


@dataclass(frozen=True, slots=True)
class _OfPath:
    scanner: Scanner

    def __call__(self, task: tuple[Path, Chunk]) -> Scanned:
        return self.scanner(task[1])
