"""Where a curation goes: the rows, with manifest.json, report.json and its page beside them, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_klear.config.files import flush_to_disk
from megatron_klear.data.rows import DataError

from .page import page_of
from .parquet import write_parquet

MANIFEST, REPORT, PAGE = "manifest.json", "report.json", "report.html"
HITS, VERDICTS, TESTS = "hits.jsonl", "verdicts.jsonl", "tests.jsonl"
_BESIDE = (MANIFEST, REPORT, PAGE, HITS, VERDICTS, TESTS)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a verb's files depend on: the verb, its settings, and the files that it reads, by hash."""

    verb: str
    settings: Mapping[str, Any]
    files: Mapping[str, list[dict[str, Any]]]
    """Under `inputs` and the like, each file's path, sha256 and bytes."""

    def content(self) -> dict[str, Any]:
        """The beginning of the manifest."""
        return {"verb": self.verb, "settings": dict(self.settings), **self.files}


def describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Path, sha256 and bytes of each file. Raises DataError where one cannot be read."""
    try:
        return [{"path": str(path), **_digest(path)} for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def is_done(output: Path, identity: Identity, *, force: bool) -> bool:
    """Whether `output` is already what `identity` gives, by the manifest and the hashes of what is there.

    Raises DataError where something else is there that `force` does not give up, and in any case where the folder's
    manifest is another file's.
    """
    manifest = _read_manifest(output)
    outputs = {entry["path"]: entry for entry in manifest["outputs"]} if manifest else {}
    if not manifest:
        foreign = [path for name in _BESIDE if (path := output.with_name(name)).exists()]
        if foreign and not force:
            raise DataError(f"{foreign[0]} is of no curation; choose another folder or pass --force")
    if not output.exists():
        return False
    same = {key: manifest.get(key) for key in identity.content()} == identity.content()
    if same and all(_is_whole(output.with_name(name), entry) for name, entry in outputs.items()):
        return True
    if not force:
        what = "what other inputs or settings gave" if outputs else "no output of a curation"
        raise DataError(f"{output} exists and is {what}; choose another file or pass --force")
    return False


class Output:
    """Files under way; nothing has its name before `commit`, and the rows get theirs last."""

    def __init__(self, output: Path, rows: IO[bytes], hits: IO[bytes]) -> None:
        self._output = output
        self._rows = rows
        self.hits = hits
        """Lines of further detail; written where there are any, under a name of the verb's."""

    def write(self, line: bytes) -> None:
        """Write one row."""
        self._rows.write(line + b"\n")

    def commit(
        self,
        identity: Identity,
        counts: Mapping[str, int],
        report: Mapping[str, Any],
        hits: Path | None,
        name_of_hits: str = HITS,
    ) -> None:
        """Give everything its name. Raises DataError where the rows do not fit Parquet."""
        self._rows.flush()
        self.hits.flush()
        rows = _partial(self._output)
        if self._output.suffix == ".parquet":
            rows = _partial(self._output.with_suffix(".rows.parquet"))
            write_parquet(_partial(self._output), rows)
        staged = {self._output.name: rows}
        for name, content in ((REPORT, _as_json(report)), (PAGE, page_of(report).encode())):
            staged[name] = _partial(self._output.with_name(name))
            staged[name].write_bytes(content)
        if hits is not None:
            staged[name_of_hits] = hits
        outputs = [{"path": name, **_digest(path)} for name, path in sorted(staged.items())]
        manifest = {**identity.content(), "counts": dict(counts), "outputs": outputs}
        staged[MANIFEST] = _partial(self._output.with_name(MANIFEST))
        staged[MANIFEST].write_bytes(_as_json(manifest))
        for path in staged.values():
            flush_to_disk(path)
        # The manifest first: what a kill leaves is then known as this output's. The rows last: they say it is done,
        # and nothing looks at the folder again.
        for name in (*_BESIDE, self._output.name):
            if name == self._output.name:
                self._remove_unfinished(but=rows)
            if name in staged:
                os.replace(staged[name], self._output.with_name(name))
            else:
                self._output.with_name(name).unlink(missing_ok=True)
        flush_to_disk(self._output.parent)

    def _remove_unfinished(self, but: Path) -> None:
        for path in {_partial(self._output), raw_hits(self._output)} - {but}:
            path.unlink(missing_ok=True)


@contextmanager
def open_output(output: Path) -> Iterator[Output]:
    """Files beside `output` to write into, removed at the end; those of a killed run are written anew.

    Raises DataError where another process writes the same output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(output)
    with partial.open("ab") as rows, raw_hits(output).open("wb") as hits:
        try:
            fcntl.flock(rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {output}; wait for it") from None
        try:
            rows.truncate(0)
            yield Output(output, rows, hits)
        finally:
            beside = [_partial(output.with_name(name)) for name in _BESIDE]
            for path in (partial, _partial(output.with_suffix(".rows.parquet")), raw_hits(output), *beside):
                path.unlink(missing_ok=True)


def raw_hits(output: Path) -> Path:
    """Where `Output.hits` are written before they are finished."""
    return _partial(output.with_name(f"{HITS}.raw"))


def finished_hits(output: Path) -> Path:
    """Where the finished hits are written before they get their name."""
    return _partial(output.with_name(HITS))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _read_manifest(output: Path) -> dict[str, Any]:
    path = output.with_name(MANIFEST)
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        names = {entry["path"] for entry in manifest["outputs"]}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no manifest of a curation; choose another folder") from None
    if output.name not in names:
        other = ", ".join(sorted(names - set(_BESIDE)))
        raise DataError(f"{path} is the manifest of {other}; choose another folder: each curation has its own")
    return manifest


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and {"path": entry["path"], **_digest(path)} == entry


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
