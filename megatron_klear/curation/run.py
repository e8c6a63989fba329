"""The verbs from files to files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.rows import DataError

from .benchmarks import read_items, read_templates
from .decontaminate import REASON, Decontamination, Scanner
from .deduplicate import deduplicate
from .grams import FAMILY_SHARE, FEWEST_CONTAINED_WORDS, GRAM_WORDS, build_index
from .output import Identity, Output, describe_files, finished_hits, is_done, open_output, raw_hits
from .report import Judged, Report
from .rules import Rule


@dataclass(frozen=True, slots=True)
class Files:
    """What every verb is given."""

    inputs: list[Path]
    output: Path
    strict: bool = False
    """A row that cannot be used is an error."""
    force: bool = False
    max_row_bytes: int = 16 << 20
    progress: Callable[[int], None] = lambda rows: None
    """Called with the number of rows done."""

    def check(self, read: Sequence[Path] = ()) -> None:
        """Raise DataError where the output cannot be written or a file is given twice."""
        if self.output.suffix not in (".jsonl", ".parquet"):
            raise DataError(f"--output {self.output} is neither .jsonl nor .parquet")
        if self.output.is_dir():
            raise DataError(f"--output {self.output} is a folder; name a file in it")
        given = [path.resolve() for path in self.inputs]
        if twice := [path for path, count in Counter(given).items() if count > 1]:
            raise DataError(f"--input names {twice[0]} twice")
        if self.output.resolve() in {*given, *(path.resolve() for path in read)}:
            raise DataError(f"--output {self.output} is among the files that are read")


def run_deduplicate(files: Files) -> dict[str, Any] | None:
    """Drop repeated problems; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written.
    """
    files.check()
    identity = Identity("deduplicate", _common(files), {"inputs": describe_files(files.inputs)})
    if is_done(files.output, identity, force=files.force):
        return None
    with open_output(files.output) as output:
        report = _write(files, deduplicate(files.inputs, files.max_row_bytes), output)
        _check_unchanged(identity, "inputs", files.inputs)
        content = {"verb": identity.verb, **report.content()}
        output.commit(identity, report.totals(), content, None)
    return content


def run_decontaminate(
    files: Files, against: list[Path], templates: list[Path], rule: Rule, workers: int
) -> dict[str, Any] | None:
    """Drop rows that overlap with the items of `against`; returns the report, None where all is there already.

    Raises DataError for what cannot be read or written.
    """
    files.check([*against, *templates])
    words = {"gram_words": GRAM_WORDS, "fewest_contained_words": FEWEST_CONTAINED_WORDS}
    of_rule = {"max_items": rule.max_items, "min_share": rule.min_share, "family_share": FAMILY_SHARE}
    read = {"inputs": files.inputs, "against": against, "templates": templates}
    identity = Identity(
        "decontaminate",
        {"rule": rule.name, **words, **(of_rule if rule.name == "careful" else {}), **_common(files)},
        {name: describe_files(paths) for name, paths in read.items()},
    )
    if is_done(files.output, identity, force=files.force):
        return None
    items = read_items(against, read_templates(templates), files.max_row_bytes)
    index = build_index(items)
    work = Decontamination(Scanner(index, rule, files.max_row_bytes), workers)
    with open_output(files.output) as output:
        report = _write(files, work.run(files.inputs, output.hits), output)
        for name, paths in read.items():
            _check_unchanged(identity, name, paths)
        output.hits.flush()
        work.finish_hits(raw_hits(files.output), finished_hits(files.output))
        if REASON in report.examples:
            report.examples[REASON] = [work.finish(example) for example in report.examples[REASON]]
        content = {
            "verb": identity.verb,
            "rule": rule.name,
            **report.content(),
            "benchmark": {"rows": len(items), "items": len(index.items), "grams": len(index.texts)},
            "common_grams": work.common_grams(),
        }
        output.commit(identity, report.totals(), content, finished_hits(files.output))
    return content


def _write(files: Files, judged: Iterable[tuple[Path, Judged]], output: Output) -> Report:
    report = Report({str(path): Counter() for path in files.inputs})
    for done, (path, row) in enumerate(judged, 1):
        if row.bad and files.strict:
            place = f"{path}: row {row.number}" if path.suffix == ".parquet" else f"{path}:{row.number}"
            raise DataError(f"{place}: {row.details['why']}")
        report.add(str(path), row)
        if not row.reason:
            output.write(row.line)
        files.progress(done)
    totals = report.totals()
    if not totals["kept"]:
        first = next((shown[0] for shown in report.examples.values()), None)
        raise DataError(f"no row is left of {totals['rows']}, so nothing is written; the first one gone: {first}")
    return report


def _common(files: Files) -> dict[str, Any]:
    return {"max_row_bytes": files.max_row_bytes, "strict": files.strict}


def _check_unchanged(identity: Identity, name: str, paths: Iterable[Path]) -> None:
    for before, after in zip(identity.files[name], describe_files(paths), strict=True):
        if before != after:
            raise DataError(f"{before['path']} changed while it was being read; start again when it is complete")
