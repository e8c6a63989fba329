"""Drop rows whose problem overlaps with a benchmark's, and say of each where, with what, and how common that is."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.data.sources import Chunk

from .benchmarks import read_items, read_templates
from .grams import FAMILY_SHARE, FEWEST_CONTAINED_WORDS, GRAM_WORDS, GramIndex, build_index
from .output import Output, finished_hits, raw_hits
from .report import Judged, Report
from .rows import BadRow, Problem, Unusable, field_of, read_problems, resolve, stream_chunks
from .rules import Rule, RuleName
from .run import Files, Place, Work, carry_out
from .text import words

_MOST_COMMON = 25
_SHOWN_WORDS = 60
REASON = "contaminated"
FEWEST_DOCUMENTS = 10
"""A 9-gram that fewer rows of a source have is no phrase of it, however small the source is."""
_ROWS = -1
_NONE: frozenset[int] = frozenset()


class DecontaminateSettings(Settings):
    """Drop rows whose problem overlaps with a benchmark's."""

    against: tuple[str, ...] = Field(min_length=1)
    """Benchmark files or globs."""
    template: tuple[Path, ...] = ()
    """Texts that files put around the benchmark's problems, one a file; cut from items first."""
    rule: RuleName = "paper"
    """`paper`: any shared 9-gram; `careful`: enough of an item's, phrases aside."""
    max_items: PositiveInt = 1
    """careful: a 9-gram of more items is a phrase."""
    min_share: float = Field(default=0.1, ge=0, le=1)
    """careful: of an item's 9-grams."""
    max_documents_share: float | None = Field(default=None, gt=0, le=1)
    """careful: a 9-gram that a larger share of a source's rows has is a phrase there (and at least 10 rows)."""
    source: str = ""
    """max_documents_share: field that names a row's source, dots for fields inside; unset, its file is its source."""

    @model_validator(mode="after")
    def _check(self) -> DecontaminateSettings:
        if self.rule == "paper" and self.model_fields_set & {"max_items", "min_share", "max_documents_share"}:
            raise ValueError("max_items, min_share and max_documents_share go with the rule careful")
        if self.source and self.max_documents_share is None:
            raise ValueError("source goes with max_documents_share")
        return self


def run_decontaminate(files: Files, settings: DecontaminateSettings) -> dict[str, Any] | None:
    """Drop rows that overlap with the items of benchmarks; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written.
    """
    against, templates = resolve(settings.against, "--against"), list(settings.template)
    rule = Rule(settings.rule, settings.max_items, settings.min_share)
    of_words = {"gram_words": GRAM_WORDS, "fewest_contained_words": FEWEST_CONTAINED_WORDS}
    of_rule: dict[str, Any] = {
        "max_items": rule.max_items,
        "min_share": rule.min_share,
        "family_share": FAMILY_SHARE,
    }
    if settings.max_documents_share is not None:
        share = {"max_documents_share": settings.max_documents_share, "fewest_documents": FEWEST_DOCUMENTS}
        of_rule |= {**share, "source": settings.source}

    def prepare() -> Work:
        items = read_items(against, read_templates(templates), files.max_row_bytes)
        scanner = Scanner(build_index(items), rule, files.max_row_bytes, settings.source)
        return _Decontamination(files, settings, scanner, len(items))

    named = {"rule": rule.name, **of_words, **(of_rule if rule.name == "careful" else {})}
    read = {"against": against, "templates": templates}
    return carry_out(files, "decontaminate", named, prepare, read=read)


@dataclass(frozen=True, slots=True)
class Scanned:
    """The rows of a chunk, judged, and in how many of them each gram occurs."""

    rows: list[Judged]
    documents: Counter[int]
    of_sources: dict[str, Counter[int]]
    """The same by source; under -1 how many rows it has. Empty where sources are not told apart."""


@dataclass(frozen=True, slots=True)
class Scanner:
    """What a worker needs to judge chunks."""

    index: GramIndex
    rule: Rule
    max_row_bytes: int
    source: str = ""
    counts_sources: bool = False
    phrases: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Of each source, grams that do not count."""

    def __call__(self, task: tuple[Path, Chunk]) -> Scanned:
        """Judge the rows of a chunk."""
        path, chunk = task
        judged: list[Judged] = []
        usable: list[tuple[int, Problem]] = []
        for problem in read_problems(chunk, self.max_row_bytes):
            if isinstance(problem, Unusable):
                judged.append(Judged.unusable(problem))
            else:
                usable.append((len(judged), problem))
                judged.append(Judged(problem.row.number, problem.row.line))
        documents: Counter[int] = Counter()
        of_sources: dict[str, Counter[int]] = defaultdict(Counter)
        told_apart = self.counts_sources or self.phrases
        sources = [self._source(problem, path) if told_apart else "" for _, problem in usable]
        if self.counts_sources:
            for source in sources:
                of_sources[source][_ROWS] += 1
        for which, match in self.index.scan([problem.text for _, problem in usable]).items():
            documents.update(set(match.grams))
            if self.counts_sources:
                of_sources[sources[which]].update(set(match.grams))
            place, problem = usable[which]
            if (hit := self.rule.hit(self.index, match, self.phrases.get(sources[which], _NONE))) is not None:
                begin, end = hit["span"]
                shown = words(problem.text)[begin : min(end, begin + _SHOWN_WORDS)]
                details = {**hit, "text": " ".join(shown) + (" ..." if end - begin > _SHOWN_WORDS else "")}
                judged[place] = Judged(problem.row.number, reason=REASON, details=details)
        return Scanned(judged, documents, dict(of_sources))

    def _source(self, problem: Problem, path: Path) -> str:
        """The row's source; one that lacks the field is of none and has no phrases."""
        try:
            return str(field_of(problem.row.value, self.source)) if self.source else str(path)
        except BadRow:
            return ""


@dataclass(slots=True)
class _Decontamination(Work):
    files: Files
    settings: DecontaminateSettings
    scanner: Scanner
    benchmark_rows: int
    documents: Counter[int] = field(default_factory=Counter)
    """How many rows have each gram; whole once all are judged."""

    def judge(self, output: Output) -> Iterator[Place]:
        """Judge all rows in order and write a line for each that is dropped; memory does not grow with the rows."""
        if self.settings.max_documents_share is not None:
            self.scanner = replace(self.scanner, phrases=self._phrases(self.settings.max_documents_share))
        for path, scanned in self._scan(self.scanner):
            self.documents.update(scanned.documents)
            for judged in scanned.rows:
                if judged.reason == REASON:
                    hit = {"file": str(path), "row": judged.number, **judged.details}
                    output.hits.write(json.dumps(hit, ensure_ascii=False).encode() + b"\n")
                yield path, judged

    def _scan(self, scanner: Scanner) -> Iterator[tuple[Path, Scanned]]:
        files = self.files
        chunks = ((path, chunk) for path in files.inputs for chunk in stream_chunks(path, files.max_row_bytes))
        return ((path, scanned) for (path, _), scanned in files.map(scanner, chunks))

    def _phrases(self, share: float) -> dict[str, frozenset[int]]:
        """Grams that more than `share` of a source's rows have, by a pass of their own."""
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for _, scanned in self._scan(replace(self.scanner, counts_sources=True)):
            for source, of_source in scanned.of_sources.items():
                counts[source].update(of_source)
        counts.pop("", None)
        return {
            source: frozenset(
                gram
                for gram, count in of_source.items()
                if gram != _ROWS and count >= FEWEST_DOCUMENTS and count > share * of_source[_ROWS]
            )
            for source, of_source in counts.items()
        }

    def finish(self, report: Report) -> dict[str, Any]:
        """Hits with their grams in words and how common those are, and what was looked for."""
        with raw_hits(self.files.output).open("rb") as lines, finished_hits(self.files.output).open("wb") as stream:
            for line in lines:
                stream.write(json.dumps(self._in_words(json.loads(line)), ensure_ascii=False).encode() + b"\n")
        if REASON in report.examples:
            report.examples[REASON] = [self._in_words(example) for example in report.examples[REASON]]
        index = self.scanner.index
        return {
            "rule": self.scanner.rule.name,
            "benchmark": {"rows": self.benchmark_rows, "items": len(index.items), "grams": len(index.texts)},
            "common_grams": self._common_grams(),
            **({"phrases": self._told_phrases()} if self.settings.max_documents_share is not None else {}),
        }

    def _in_words(self, hit: dict[str, Any]) -> dict[str, Any]:
        return {**hit, "gram": self._gram(hit["gram"])}

    def _told_phrases(self) -> dict[str, list[str]]:
        texts = self.scanner.index.texts
        return {
            source: [" ".join(texts[gram]) for gram in sorted(grams)[:_MOST_COMMON]]
            for source, grams in self.scanner.phrases.items()
        }

    def _common_grams(self) -> list[dict[str, Any]]:
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
