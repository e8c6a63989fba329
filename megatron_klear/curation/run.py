"""What every verb does besides judging: checks, what is done already, counting, and writing whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megatron_klear.data.rows import DataError

from .output import HITS, Identity, Output, describe_files, finished_hits, is_done, open_output
from .ray_engine import RayEngine
from .report import Judged, Report
from .rows import Row, Unusable, decode, stream_chunks
from .workers import ordered_map

Place = tuple[Path, Judged]
"""A row after a verb has looked at it, and the file it is in."""
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Files:
    """What every verb is given besides its settings."""

    inputs: list[Path]
    output: Path
    strict: bool = False
    """A row that cannot be used is an error."""
    force: bool = False
    max_row_bytes: int = 16 << 20
    workers: int = 1
    """Processes; no file depends on how many."""
    engine: RayEngine | None = None
    """Whose workers they are; those of this process unless given."""
    progress: Callable[[int], None] = lambda rows: None
    """Called with the number of rows done."""

    def check(self, read: Iterable[Path] = ()) -> None:
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

    def rows(self) -> Iterator[tuple[Path, str, Row | Unusable]]:
        """All rows in order, each with its file and its place as errors name it.

        Raises DataError where a file cannot be read.
        """
        for path in self.inputs:
            for chunk in stream_chunks(path, self.max_row_bytes):
                for row in decode(chunk, self.max_row_bytes):
                    yield path, chunk.where(row.number), row

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task with the function's result, in order; the function is pickled where there are workers."""
        if self.engine is not None:
            return self.engine.map(function, tasks)
        return ordered_map(function, tasks, self.workers)


class Work(ABC):
    """What a verb does once it is known that it has to be done."""

    lines: ClassVar[str] = HITS
    """The name that its further lines get."""

    @abstractmethod
    def judge(self, output: Output) -> Iterable[Place]:
        """Judge all rows, in the order in which the kept ones are written; further lines may go to `output.hits`."""

    def finish(self, report: Report) -> dict[str, Any]:
        """After the last row: what the verb adds to the report.

        It also finishes the further lines where there are to be any, from `raw_hits` of the output into
        `finished_hits`; only then is there a file of them.
        """
        return {}


def carry_out(
    files: Files,
    verb: str,
    settings: Mapping[str, Any],
    prepare: Callable[[], Work],
    *,
    read: Mapping[str, Sequence[Path]] | None = None,
) -> dict[str, Any] | None:
    """Write the rows that a verb keeps, with manifest and report; returns the report, None where all is there already.

    `settings` are those that the files depend on; `read` are the files besides the inputs, each list under a name.
    `prepare` comes before anything is written, and only where there is something to do.

    Raises DataError for what cannot be read or written.
    """
    reading = {"inputs": files.inputs, **(read or {})}
    files.check(path for paths in (read or {}).values() for path in paths)
    common = {"max_row_bytes": files.max_row_bytes, "strict": files.strict}
    identity = Identity(verb, {**settings, **common}, {name: describe_files(paths) for name, paths in reading.items()})
    if is_done(files.output, identity, force=files.force):
        return None
    work = prepare()
    with open_output(files.output) as output:
        report = write_kept(files, work.judge(output), output)
        for name, paths in reading.items():
            check_unchanged(identity, name, paths)
        output.hits.flush()
        added = work.finish(report)
        content = {"verb": verb, **report.content(), **added}
        hits = finished_hits(files.output)
        output.commit(identity, report.totals(), content, hits if hits.exists() else None, work.lines)
    return content


def write_kept(files: Files, judged: Iterable[Place], output: Output) -> Report:
    """Write the rows that are kept and count all.

    Raises DataError where none is kept, and at the first that cannot be used where `files` are strict.
    """
    report = Report({str(path): Counter() for path in files.inputs})
    for done, (path, row) in enumerate(judged, 1):
        if row.bad and files.strict:
            place = f"{path}: row {row.number}" if path.suffix in (".parquet", ".json") else f"{path}:{row.number}"
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


def check_unchanged(identity: Identity, name: str, paths: Iterable[Path]) -> None:
    """Raise DataError where a file is no longer what it was at the start."""
    for before, after in zip(identity.files[name], describe_files(paths), strict=True):
        if before != after:
            raise DataError(f"{before['path']} changed while it was being read; start again when it is complete")
