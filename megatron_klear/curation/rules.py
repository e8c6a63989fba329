"""When a text that shares 9-grams with a benchmark counts as a copy of one of its items."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from .grams import GramIndex, Match

RuleName = Literal["paper", "careful"]


@dataclass(frozen=True, slots=True)
class Rule:
    """`paper`: any shared 9-gram (AceReason and Klear). `careful`: enough of an item's 9-grams, phrases aside.

    Under `careful` a 9-gram that more than `max_items` different problems have is a phrase and does not count, and
    the others found must be `min_share` of all 9-grams of the item. An item whose every 9-gram is found is a hit
    under both.
    """

    name: RuleName = "paper"
    max_items: int = 1
    min_share: float = 0.1

    def hit(self, index: GramIndex, match: Match, phrases: frozenset[int] = frozenset()) -> dict[str, Any] | None:
        """The item of which most was found, and where; None where no item is hit. `phrases` do not count either."""
        places: dict[int, dict[int, int]] = defaultdict(dict)
        for position, gram in zip(match.positions, match.grams, strict=True):
            for item in index.gram_items[gram]:
                places[item].setdefault(gram, position)
        hit = {item: grams for item, grams in places.items() if self._is_hit(index, item, grams, phrases)}
        if not hit:
            return None
        best = min(hit, key=lambda item: (-len(hit[item]) / index.item_grams[item], -len(hit[item]), item))
        gram = min(hit[best], key=lambda gram: (index.num_families[gram], hit[best][gram]))
        begin, end = _span(match, hit[best], hit[best][gram], len(index.texts[gram]))
        return {
            "item": index.items[best].place,
            "other_items": len(hit) - 1,
            "share": round(len(hit[best]) / index.item_grams[best], 4),
            "span": [begin, end],
            "gram": gram,
        }

    def _is_hit(self, index: GramIndex, item: int, grams: dict[int, int], phrases: frozenset[int]) -> bool:
        if self.name == "paper" or len(grams) == index.item_grams[item]:
            return True
        own = sum(index.num_families[gram] <= self.max_items and gram not in phrases for gram in grams)
        return own > 0 and own >= self.min_share * index.item_grams[item]


def _span(match: Match, of_item: dict[int, int], start: int, length: int) -> tuple[int, int]:
    """The run of words round `start` in which every window is one of the item's grams."""
    positions = {position for position, gram in zip(match.positions, match.grams, strict=True) if gram in of_item}
    begin = end = start
    while begin - 1 in positions:
        begin -= 1
    while end + 1 in positions:
        end += 1
    return begin, end + length
