"""A training set from its sources: every step a verb with a folder of its own, done once, and one report over all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_klear.config.base import Settings
from megatron_klear.config.files import write_text_atomically
from megatron_klear.data.rows import DataError, read_problem, read_row
from megatron_klear.data.sources import Chunk
from megatron_klear.errors import UserError

from .build_config import BuildConfig, SetConfig
from .output import MANIFEST, PAGE, REPORT, Output
from .page import page_of
from .ray_engine import open_engine
from .report import Judged, Report, in_words
from .rows import Row, Unusable, decode, resolve, stream_chunks
from .run import Files, Place, Work, carry_out
from .verbs import VERBS

SOURCE_KEY = "curated_from"
"""Of a row in a build: the name of its source."""
Form = Literal["sft", "rl"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One folder of a build, and what fills it."""

    set_name: str
    label: str
    files: Files
    run: Callable[[], dict[str, Any] | None]


def plan(config: BuildConfig, common: Files | None = None) -> list[Step]:
    """All steps in order: a set's rows are gathered, go through its steps, and are checked for the form trained on.

    `common` is what the files of all steps share besides what is in `config`. Raises DataError where a source has no
    files.
    """
    found = {source.name: resolve(source.files, f"sources.{source.name}") for source in config.sources}
    files = replace(
        common or Files([], config.output),
        strict=config.strict,
        force=config.force,
        max_row_bytes=int(config.max_row_mib * (1 << 20)),
        workers=config.workers,
    )
    return [step for name, wanted in config.sets() for step in _of_set(config.output / name, wanted, found, files)]


def run_build(config: BuildConfig, tell: Tell, progress: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """Carry out every step that is not done yet, and write one report over all of them, which is returned.

    Raises UserError that names the step which cannot be done.
    """
    _check_free(config)
    with open_engine(config.engine, config.workers, config.ray_address) as engine:
        sets = _carry_out_all(plan(config, Files([], config.output, engine=engine, progress=progress)), config, tell)
    content = {"verb": "build", "sets": sets}
    write_text_atomically(config.output / PAGE, page_of(content))
    write_text_atomically(config.output / REPORT, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return content


def _carry_out_all(steps: Sequence[Step], config: BuildConfig, tell: Tell) -> dict[str, Any]:
    """The sets, each with the reports of its steps."""
    sets: dict[str, dict[str, Any]] = {}
    for step in steps:
        where = f"{step.set_name}, {step.label}"
        try:
            done_before = step.run() is None
        except UserError as error:
            raise DataError(f"{where}: {error}") from error
        folder = step.files.output.parent
        report = json.loads((folder / REPORT).read_bytes())
        tell(f"{where}: {in_words(report)}{', done before' if done_before else ''}")
        entry = {"label": step.label, "folder": str(folder.relative_to(config.output)), **report}
        of_set = sets.setdefault(step.set_name, {"steps": []})
        of_set["steps"].append(entry)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        (rows,) = [entry for entry in manifest["outputs"] if entry["path"] == step.files.output.name]
        of_set |= {"rows": report["counts"]["kept"], "file": str(step.files.output), "sha256": rows["sha256"]}
    return sets


def _check_free(config: BuildConfig) -> None:
    """Raise DataError where the folder has the report of something else."""
    path = config.output / REPORT
    try:
        ours = not path.exists() or json.loads(path.read_bytes())["verb"] == "build"
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours and not config.force:
        raise DataError(f"{path} is of no build; choose another output or pass --force")


def _of_set(folder: Path, wanted: SetConfig, found: Mapping[str, list[Path]], common: Files) -> Iterator[Step]:
    name = folder.name

    def files(inputs: Sequence[Path], output: Path) -> Files:
        return replace(common, inputs=list(inputs), output=output)

    names = {path: source for source in wanted.sources for path in found[source]}
    gathered = files([path for source in wanted.sources for path in found[source]], folder / "0-gather" / "rows.jsonl")
    yield Step(name, "gather", gathered, lambda: _gather(gathered, names))
    last = gathered
    for number, step in enumerate(wanted.steps, 1):
        kind: str = getattr(step, "kind")  # noqa: B009
        last = files([last.output], folder / f"{number}-{kind}" / "rows.jsonl")
        yield Step(name, f"{number} {kind}", last, _Verb(kind, last, step))
    ready = files([last.output], folder / "rows.jsonl")
    yield Step(name, "check", ready, lambda: _check(ready, "sft" if name == "sft" else "rl"))


@dataclass(frozen=True, slots=True)
class _Verb:
    """A verb with its files and settings, to call."""

    kind: str
    files: Files
    step: Settings

    def __call__(self) -> dict[str, Any] | None:
        verb = VERBS[self.kind]
        given = self.step.model_dump(exclude={"kind"}, exclude_unset=True)
        return verb.run(self.files, verb.settings(**given))


def _gather(files: Files, names: Mapping[Path, str]) -> dict[str, Any] | None:
    """The rows of all sources, each with its source's name."""
    named = [names[path] for path in files.inputs]
    return carry_out(files, "gather", {"sources": named}, lambda: _Gathering(files, names))


@dataclass(frozen=True, slots=True)
class _Gathering(Work):
    files: Files
    names: Mapping[Path, str]

    def judge(self, output: Output) -> Iterator[Place]:
        """All rows, with one more key."""
        files = self.files
        chunks = ((path, chunk) for path in files.inputs for chunk in stream_chunks(path, files.max_row_bytes))
        for (path, _), rows in files.map(_Decode(files.max_row_bytes), chunks):
            more = f"{json.dumps(SOURCE_KEY)}: {json.dumps(self.names[path], ensure_ascii=False)}}}".encode()
            for row in rows:
                if isinstance(row, Unusable):
                    yield path, Judged.unusable(row)
                else:  # the rest stays as it is, byte for byte; of two equal keys the last one counts
                    comma = b", " if row.value else b""
                    yield path, Judged(row.number, row.line[:-1].rstrip() + comma + more)


def _check(files: Files, form: Form) -> dict[str, Any] | None:
    """The finished set: every row must be of the form that is trained on."""
    return carry_out(files, "check", {"form": form}, lambda: _Checking(files, form))


@dataclass(frozen=True, slots=True)
class _Checking(Work):
    files: Files
    form: Form
    shares: Counter[str] = field(default_factory=Counter)

    def judge(self, output: Output) -> Iterator[Place]:
        """All rows. Raises DataError at one that cannot be trained on."""
        files = self.files
        chunks = ((path, chunk) for path in files.inputs for chunk in stream_chunks(path, files.max_row_bytes))
        for (path, chunk), rows in files.map(_Decode(files.max_row_bytes), chunks):
            for row in rows:
                if isinstance(row, Unusable):
                    raise DataError(f"{chunk.where(row.number)}: {row.reason}")
                try:
                    (read_row if self.form == "sft" else read_problem)(row.value)
                except DataError as error:
                    raise DataError(f"{chunk.where(row.number)}: {error}") from None
                self.shares[str(row.value.get(SOURCE_KEY))] += 1
                yield path, Judged(row.number, row.line)

    def finish(self, report: Report) -> dict[str, Any]:
        """How many rows come from each source."""
        return {"shares": dict(sorted(self.shares.items(), key=lambda share: (-share[1], share[0])))}


@dataclass(frozen=True, slots=True)
class _Decode:
    """What a worker does with a chunk."""

    max_row_bytes: int

    def __call__(self, task: tuple[Path, Chunk]) -> list[Row | Unusable]:
        return list(decode(task[1], self.max_row_bytes))
