"""The verbs of curation by name. Another one is another entry: its flags and its table in a build are its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_klear.config.base import Settings

from .decontaminate import DecontaminateSettings, run_decontaminate
from .deduplicate import DeduplicateSettings, run_deduplicate
from .distill import DistillSettings, run_distill
from .filter_code import FilterCodeSettings, run_filter_code
from .pass_rate import PassRateSettings, run_filter_pass_rate
from .run import Files
from .select import SelectSettings, run_select


@dataclass(frozen=True, slots=True)
class Verb:
    """What a verb is told, by a class whose docstring says what it does, and what carries it out."""

    settings: type[Settings]
    run: Callable[[Files, Any], dict[str, Any] | None]
    """Given files and settings of that class; returns the report, None where all is there already."""
    on_engine: bool = True
    """Whether `--engine` has its workers; verbs that grade or ask a teacher have processes of their own."""


VERBS = {
    "deduplicate": Verb(DeduplicateSettings, run_deduplicate),
    "decontaminate": Verb(DecontaminateSettings, run_decontaminate),
    "select": Verb(SelectSettings, run_select),
    "filter-code": Verb(FilterCodeSettings, run_filter_code, on_engine=False),
    "filter-pass-rate": Verb(PassRateSettings, run_filter_pass_rate, on_engine=False),
    "distill": Verb(DistillSettings, run_distill, on_engine=False),
}
