"""Faults that the tests of the row kernels must notice: put into csrc/ all at once, committed one at a time.

Each is another text for the part between « and » of a place of the source. All are compiled into one library, each
behind `emulated::planted(number)`; numbers count from 1 in the order of `PLANTED`.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from emulator import planted_faults, planted_sharded
from emulator.device import CallError, EmulatedFault
from emulator.planted_faults import Fault

PLANTED = (*planted_faults.FAULTS, *planted_sharded.FAULTS)


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    stop: int


def plant(sources: dict[str, str]) -> dict[str, str]:
    """The sources with every fault of `PLANTED` in them, none committed.

    Raises ValueError where the place of a fault is not in its file exactly once, or two places overlap without being
    the same.
    """
    spans: dict[str, dict[_Span, list[tuple[int, Fault]]]] = defaultdict(lambda: defaultdict(list))
    for number, fault in enumerate(PLANTED, start=1):
        spans[fault.file][_find(sources[fault.file], fault)].append((number, fault))
    planted = dict(sources)
    for name, found in spans.items():
        ordered = sorted(found, key=lambda span: span.start)
        for one, other in itertools.pairwise(ordered):
            if one.stop > other.start:
                raise ValueError(f"{found[one][0][1].name!r} and {found[other][0][1].name!r} overlap in {name}")
        for span in reversed(ordered):
            text = planted[name]
            planted[name] = text[: span.start] + _choice(text[span.start : span.stop], found[span]) + text[span.stop :]
    return planted


def noticed(cases: Iterable[Callable[[], None]]) -> Iterator[str]:
    """What is noticed first, in the words of `Fault.seen_as`; nothing where all is well."""
    try:
        for case in cases:
            case()
    except EmulatedFault as fault:
        yield from str(fault).splitlines()
    except CallError as error:
        yield f"error {error.code}"
    except AssertionError as error:
        yield f"values: {error}"


def _find(text: str, fault: Fault) -> _Span:
    before, part, after = re.split("[«»]", fault.place)
    where = before + part + after
    if text.count(where) != 1:
        raise ValueError(f"{fault.name!r}: its place is {text.count(where)} times in {fault.file}")
    start = text.index(where) + len(before)
    return _Span(start, start + len(part))


def _choice(part: str, faults: list[tuple[int, Fault]]) -> str:
    """The part, or what the committed fault has in its place."""
    for number, fault in faults:
        condition = f"::emulated::planted({number})"
        if part.rstrip().endswith((";", "}")):
            part = f"{{ if ({condition}) {{ {fault.new} }} else {{ {part} }} }}"
        else:
            part = f"({condition} ? ({fault.new}) : ({part}))"
    return part
