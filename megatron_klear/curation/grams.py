"""The 9-grams of benchmarks and where texts share them: hashed and looked up over many texts at once.

A text becomes numbers of the benchmarks' own vocabulary; a word that no benchmark has breaks it. Windows without a
break are hashed by a polynomial modulo 2^64, looked up behind a bitmap, and compared word by word.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, repeat

import numpy as np
from numpy.typing import NDArray

from megatron_klear.data.rows import DataError

from .text import words

GRAM_WORDS = 9
FEWEST_CONTAINED_WORDS = 3
"""An item of fewer words is found only as a whole text: two words stand in many texts by chance."""
FAMILY_SHARE = 0.6
"""Of the longer item's grams: two items that share so many are versions of one problem."""
_MULTIPLIER = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_MULTIPLIER, power, 1 << 64) for power in range(GRAM_WORDS)], dtype=np.uint64)
_BITMAP_SHIFT = np.uint64(42)
_MOST_FAMILY_ITEMS = 8
"""A 9-gram of more items is a phrase of the benchmark, and says nothing of two items being one problem."""


@dataclass(frozen=True, slots=True)
class Item:
    """One problem of a benchmark, by its first place among the files."""

    place: Mapping[str, object]
    segments: tuple[tuple[str, ...], ...]
    """Its words, apart where a template was cut out."""

    def grams(self) -> set[tuple[str, ...]]:
        """Its distinct 9-grams; of an item without any, the longest run of its words."""
        found = {
            segment[start : start + GRAM_WORDS]
            for segment in self.segments
            for start in range(len(segment) - GRAM_WORDS + 1)
        }
        return found or {max(self.segments, key=len)}


@dataclass(frozen=True, slots=True)
class _Table:
    """Grams of one length, sorted by hash."""

    keys: NDArray[np.uint64]
    grams: NDArray[np.uint64]
    """Numbers of their words, [grams, length]."""
    bitmap: NDArray[np.bool_]
    first: int
    """Gram number of the first one."""


@dataclass(frozen=True, slots=True)
class Match:
    """The grams that one text shares: `positions[k]` is the word at which gram `grams[k]` starts."""

    positions: list[int]
    grams: list[int]


@dataclass(frozen=True, slots=True)
class GramIndex:
    """All grams of all items."""

    items: list[Item]
    vocabulary: dict[str, int]
    tables: dict[int, _Table]
    """By length; those below 9 hold short items."""
    whole: dict[tuple[str, ...], int]
    """Gram numbers of items that only a whole text matches."""
    texts: list[tuple[str, ...]]
    """The words of each gram."""
    gram_items: list[tuple[int, ...]]
    """Items that have each gram."""
    num_families: list[int]
    """Of each gram: how many different problems have it; versions of one problem count once."""
    item_grams: list[int]
    """How many distinct grams each item has."""

    def scan(self, texts: Sequence[str]) -> dict[int, Match]:
        """The texts that share a gram, by index, with where."""
        numbers: list[int] = []
        starts: list[int] = []
        found: dict[int, Match] = {}
        for index, text in enumerate(texts):
            tokens = words(text)
            starts.append(len(numbers))
            numbers.extend(map(self.vocabulary.get, tokens, repeat(0)))  # type: ignore[arg-type]
            numbers.append(0)
            if len(tokens) < FEWEST_CONTAINED_WORDS and (gram := self.whole.get(tuple(tokens))) is not None:
                found[index] = Match([0], [gram])
        ids = np.array(numbers + [0] * GRAM_WORDS, dtype=np.uint64)
        firsts = np.array(starts)
        for position, gram in self._look_up(ids):
            index = int(np.searchsorted(firsts, position, side="right")) - 1
            match = found.setdefault(index, Match([], []))
            match.positions.append(position - starts[index])
            match.grams.append(gram)
        return dict(sorted(found.items()))

    def _look_up(self, ids: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Position and number of every gram in `ids`, in which 0 is a break; the last nine are breaks."""
        if not self.tables:
            return []
        places = np.arange(len(ids))
        breaks = np.where(ids == 0, places, len(ids))
        room = np.minimum.accumulate(breaks[::-1])[::-1] - places
        hashes = np.zeros(len(ids) - GRAM_WORDS, dtype=np.uint64)
        hits: list[tuple[int, int]] = []
        for length in range(1, GRAM_WORDS + 1):
            hashes += ids[length - 1 : length - 1 + len(hashes)] * _POWERS[length - 1]
            table = self.tables.get(length)
            if table is None:
                continue
            at = np.nonzero(room[: len(hashes)] >= length)[0]
            at = at[table.bitmap[hashes[at] >> _BITMAP_SHIFT]]
            slots = np.minimum(np.searchsorted(table.keys, hashes[at]), len(table.keys) - 1)
            same = np.all(ids[at[:, None] + np.arange(length)] == table.grams[slots], axis=1)
            hits += zip(at[same].tolist(), (slots[same] + table.first).tolist(), strict=True)
        return sorted(hits)


def build_index(items: Sequence[Item]) -> GramIndex:
    """Index the grams of `items`; items of equal words count once, by the first place.

    Raises DataError where an item has no word.
    """
    distinct: dict[tuple[tuple[str, ...], ...], Item] = {}
    for item in items:
        if not item.segments:
            raise DataError(f"{item.place['file']}: row {item.place['row']}: the item has no word to look for")
        distinct.setdefault(item.segments, item)
    kept = list(distinct.values())
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    of_items = [sorted(item.grams()) for item in kept]
    for number, grams in enumerate(of_items):
        for gram in grams:
            owners[gram].append(number)
    vocabulary: dict[str, int] = {}
    for item in kept:
        for segment in item.segments:
            for word in segment:
                vocabulary.setdefault(word, len(vocabulary) + 1)
    tables, texts = _tables(owners, vocabulary)
    whole = {gram: len(texts) + k for k, gram in enumerate(g for g in owners if len(g) < FEWEST_CONTAINED_WORDS)}
    texts += whole
    family = _families(owners.values(), [len(grams) for grams in of_items])
    return GramIndex(
        items=kept,
        vocabulary=vocabulary,
        tables=tables,
        whole=whole,
        texts=texts,
        gram_items=[tuple(owners[gram]) for gram in texts],
        num_families=[len({family[number] for number in owners[gram]}) for gram in texts],
        item_grams=[len(grams) for grams in of_items],
    )


def _tables(
    owners: Mapping[tuple[str, ...], list[int]], vocabulary: Mapping[str, int]
) -> tuple[dict[int, _Table], list[tuple[str, ...]]]:
    tables: dict[int, _Table] = {}
    texts: list[tuple[str, ...]] = []
    for length in range(FEWEST_CONTAINED_WORDS, GRAM_WORDS + 1):
        grams = [gram for gram in owners if len(gram) == length]
        if not grams:
            continue
        ids = np.array([[vocabulary[word] for word in gram] for gram in grams], dtype=np.uint64)
        keys = (ids * _POWERS[:length]).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys, ids = keys[order], ids[order]
        if np.any(keys[1:] == keys[:-1]):
            raise DataError("two 9-grams of the benchmarks have one hash; give --against its files in another order")
        bitmap = np.zeros(1 << 22, dtype=np.bool_)
        bitmap[keys >> _BITMAP_SHIFT] = True
        tables[length] = _Table(keys, ids, bitmap, len(texts))
        texts += [grams[index] for index in order]
    return tables, texts


def _families(owners: Iterable[list[int]], num_grams: Sequence[int]) -> list[int]:
    """The family of each item: items that share most of the longer one's grams are versions of one problem."""
    shared: Counter[tuple[int, int]] = Counter()
    for numbers in owners:
        if 1 < len(numbers) <= _MOST_FAMILY_ITEMS:
            shared.update(combinations(numbers, 2))
    family = list(range(len(num_grams)))

    def root(number: int) -> int:
        while family[number] != number:
            number = family[number]
        return number

    for (one, other), count in shared.items():
        if count >= FAMILY_SHARE * max(num_grams[one], num_grams[other]):
            first, second = sorted((root(one), root(other)))
            family[second] = first
    return [root(number) for number in range(len(num_grams))]
