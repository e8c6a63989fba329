"""Choose rows: by source, teacher, verdicts and difficulty, and a spread-out subset of each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.data.rows import DataError

from .features import DIMENSIONS, TERM_BITS, rarity_of, read_embeddings, rounded, vector
from .k_center import k_center
from .output import Output
from .report import Judged, Report
from .row_filter import Looked, Looker
from .rows import resolve, stream_chunks
from .run import Files, Place, Work, carry_out
from .verdict_file import read_verdicts


class SelectSettings(Settings):
    """Choose rows: by source, teacher, verdicts and difficulty, and a spread-out subset of each source."""

    source: str = ""
    """Field that names a row's source, dots for fields inside (`extra_info.source`); unset, its file is its source."""
    ranking: tuple[str, ...] = ()
    """Sources, the best first; unset, the files in the order given."""
    top_sources: PositiveInt | None = None
    """Keep rows of this many sources, the first of the ranking."""
    per_source: PositiveInt | None = None
    """At most so many rows of each source."""
    total: PositiveInt | None = None
    """So many rows in all, equally many of each source; what a small source lacks the others give."""
    method: Literal["first", "random", "k_center"] = "first"
    """How the rows of a source are chosen: the first, at random, or by K-Center-Greedy."""
    features: Path | None = None
    """k_center: a .npy array of floats, a row for every row of the inputs in order; unset, hashed n-grams by TF-IDF."""
    seed: int = Field(default=0, ge=0)
    where: tuple[str, ...] = ()
    """Keep rows with these fields, each written `field=value`: `teacher=DeepSeek-R1-0528`."""
    verdicts: tuple[str, ...] = ()
    """Files of verdicts, or globs: lines with `problem`, `sample` and `passed`."""
    correct: Literal["mixed", "only", "wrong"] = "mixed"
    """Keep rows whose own completion passed, or those whose did not; `mixed` keeps both."""
    sample: str = "sample"
    """correct: the field with the number of a row's completion."""
    difficulty: Literal["all", "easy", "hard"] = "all"
    """Keep rows of easy or of hard problems."""
    easy_rate: float = Field(default=0.5, ge=0, lt=1)
    """A problem is easy where more than this share of its completions passed."""

    @model_validator(mode="after")
    def _check(self) -> SelectSettings:
        if (self.correct != "mixed" or self.difficulty != "all") and not self.verdicts:
            raise ValueError("correct and difficulty need verdicts, the files with them")
        if self.method != "first" and self.total is None and self.per_source is None:
            raise ValueError(f"the method {self.method} chooses nothing without total or per_source")
        if self.features is not None and self.method != "k_center":
            raise ValueError("features are read by the method k_center alone")
        if self.source and self.top_sources is not None and not self.ranking:
            raise ValueError("top_sources of a field needs a ranking of its values")
        if self.ranking and not self.source:
            raise ValueError("a ranking names values of the field source; files are ranked by the order of the inputs")
        if len(set(self.ranking)) < len(self.ranking):
            raise ValueError("ranking names a source twice")
        if wrong := [each for each in self.where if not each.partition("=")[0] or "=" not in each]:
            raise ValueError(f"where has {wrong[0]!r}, expected field=value")
        return self

    def sources(self, files: Files) -> tuple[str, ...] | None:
        """Sources whose rows are kept; None for all."""
        ranked = self.ranking or (() if self.source else tuple(map(str, files.inputs)))
        if self.top_sources is None:
            return self.ranking or None
        if self.top_sources > len(ranked):
            raise DataError(f"top_sources is {self.top_sources}, and {len(ranked)} sources are ranked")
        return ranked[: self.top_sources]


def run_select(files: Files, settings: SelectSettings) -> dict[str, Any] | None:
    """Choose rows; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written, and where a source of the ranking has no row.
    """
    verdicts = resolve(settings.verdicts, "--verdicts")
    sources = settings.sources(files)
    read = {"verdicts": verdicts, "features": [settings.features] if settings.features else []}
    named = {**settings.model_dump(mode="json", exclude={"verdicts", "features"}), "term_bits": TERM_BITS}

    def prepare() -> Work:
        wanted = tuple((name, value) for name, _, value in (each.partition("=") for each in settings.where))
        looker = Looker(
            max_row_bytes=files.max_row_bytes,
            source=settings.source,
            sources=None if sources is None else frozenset(sources),
            wanted=wanted,
            verdicts=read_verdicts(verdicts) if verdicts else None,
            correct=settings.correct,
            sample=settings.sample,
            difficulty=settings.difficulty,
            easy_rate=settings.easy_rate,
        )
        return _Selection(files, settings, looker, sources or ())

    return carry_out(files, "select", named, prepare, read=read)


@dataclass(slots=True)
class _Selection(Work):
    """Two passes over the rows, three for K-Center: what is there, (its vectors,) and what is chosen.

    Memory: about 45 bytes a row, with k_center 128 more or, of the largest source, the width of the user's array.
    """

    files: Files
    settings: SelectSettings
    looker: Looker
    ranked: tuple[str, ...]
    chosen_of: dict[str, int] = field(default_factory=dict)
    pass_rates: Counter[int] = field(default_factory=Counter)
    """Kept rows by the tenth that their problem's pass rate is in."""

    def judge(self, output: Output) -> Iterator[Place]:
        """Judge all rows in order."""
        chosen = self._choose()
        for number, (path, row) in enumerate(self._look(self.looker)):
            if not row.judged.reason and not chosen[number]:
                yield path, Judged(row.judged.number, reason="not_chosen", details={"source": row.source})
                continue
            if not row.judged.reason and row.pass_rate is not None:
                self.pass_rates[int(row.pass_rate * 10)] += 1
            yield path, row.judged

    def finish(self, report: Report) -> dict[str, Any]:
        """How many rows of each source were chosen, and how hard their problems are."""
        added: dict[str, Any] = {"chosen": self.chosen_of}
        if self.looker.verdicts is not None:
            added["pass_rates"] = [self.pass_rates[tenth] for tenth in range(11)]
        return added

    def _look(self, looker: Looker) -> Iterator[tuple[Path, Looked]]:
        files = self.files
        chunks = ((path, chunk) for path in files.inputs for chunk in stream_chunks(path, files.max_row_bytes))
        for (path, _), rows in files.map(looker, chunks):
            for row in rows:
                yield path, row

    def _choose(self) -> NDArray[np.bool_]:
        """Whether each row of the inputs is kept, of those that nothing else drops."""
        rows: dict[str, list[int]] = {name: [] for name in self.ranked}
        counts = np.zeros(1 << TERM_BITS, dtype=np.int64)
        hashed = self.settings.method == "k_center" and self.settings.features is None
        looker = self.looker.with_terms() if hashed else self.looker
        number = -1
        for number, (_, row) in enumerate(self._look(looker)):
            if row.judged.bad and self.files.strict:
                return np.zeros(number + 1, dtype=np.bool_)  # whoever writes meets this row and stops
            if not row.judged.reason:
                rows.setdefault(row.source, []).append(number)
                counts[np.unique(row.terms)] += 1
        if empty := [name for name in self.ranked if not rows[name]]:
            raise DataError(f"no row of the source {empty[0]!r} is left to choose from; is its name right?")
        wanted = _quotas({name: len(of) for name, of in rows.items()}, self.settings)
        places = {name: np.array(of, dtype=np.int64) for name, of in rows.items()}
        chosen = np.zeros(number + 1, dtype=np.bool_)
        vectors = self._vectors(places, number + 1, counts) if self.settings.method == "k_center" else {}
        for name, of in places.items():
            chosen[of[self._of_source(len(of), wanted[name], vectors.get(name))]] = True
        self.chosen_of = wanted
        return chosen

    def _of_source(self, rows: int, count: int, vectors: NDArray[np.int8] | None) -> NDArray[np.int64]:
        if self.settings.method == "first":
            return np.arange(count)
        chance = np.random.default_rng(self.settings.seed)
        if vectors is None:
            return np.sort(chance.permutation(rows)[:count])
        return k_center(vectors, count, int(chance.integers(rows)))

    def _vectors(
        self, places: dict[str, NDArray[np.int64]], rows: int, counts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.int8]]:
        if self.settings.features is not None:
            array = read_embeddings(self.settings.features)
            if len(array) != rows:
                raise DataError(f"features {self.settings.features} has {len(array)} rows, the inputs {rows}")
            return {name: rounded(array[of]) for name, of in places.items()}
        rarity = rarity_of(counts, sum(map(len, places.values())))
        vectors = {name: np.zeros((len(of), DIMENSIONS), dtype=np.int8) for name, of in places.items()}
        done: Counter[str] = Counter()
        for _, row in self._look(self.looker.with_terms()):
            if not row.judged.reason:
                vectors[row.source][done[row.source]] = vector(row.terms, rarity)
                done[row.source] += 1
        return vectors


def _quotas(available: dict[str, int], settings: SelectSettings) -> dict[str, int]:
    """Rows to take of each source: equally many, what a small one lacks from the others, the first ones first."""
    most = {name: min(count, settings.per_source or count) for name, count in available.items()}
    if settings.total is None:
        return most
    left, quotas = settings.total, dict.fromkeys(most, 0)
    while left and (open_ := [name for name in most if quotas[name] < most[name]]):
        share, rest = divmod(left, len(open_))
        for index, name in enumerate(open_):
            more = min(share + (index < rest), most[name] - quotas[name])
            quotas[name] += more
            left -= more
    return quotas
