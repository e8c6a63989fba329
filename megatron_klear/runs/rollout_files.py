"""The samples of every rollout step, in columns, to be read later by people, by the report and by other programs.

A file `step-00000012.parquet` has a row a group: the prompt once, and lists with an entry a sample. Numbers of tokens
are lists of lists, in half precision. A small step is a file `step-00000012.jsonl` instead, an object a sample, to be
looked at with a pager. `read_samples` gives a dictionary a sample from both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_klear.config.files import flush_to_disk
from megatron_klear.rewards.truth_store import TruthReadError, TruthRef, read_truth
from megatron_klear.types import Group, Prompt

ROW_GROUP = 16
"""Groups that are read together: a reader that wants a few samples need not read a step of gigabytes."""

_TOKENS = pa.list_(pa.list_(pa.int32()))
_NUMBERS = pa.list_(pa.list_(pa.float16()))
_OF_GROUP = {"step": pa.int64(), "prompt_id": pa.string(), "data_source": pa.string(), "prompt": pa.string()}
_OF_SAMPLES = {
    "response": pa.list_(pa.string()),
    "token_ids": _TOKENS,
    "logprobs": _NUMBERS,
    "ratio": _NUMBERS,
    "advantage": pa.list_(pa.float64()),
    "reward": pa.list_(pa.float64()),
    "verdict": pa.list_(pa.string()),
    "note": pa.list_(pa.string()),
    "finish": pa.list_(pa.string()),
    "weight_version": pa.list_(pa.int32()),
    "version_spans": pa.list_(pa.list_(pa.list_(pa.int32()))),
}
SCHEMA = pa.schema([*_OF_GROUP.items(), ("ground_truth", pa.string()), *_OF_SAMPLES.items()])
Arrays = Sequence[npt.NDArray[np.float32]]
Form = Literal["auto", "parquet", "jsonl"]
SMALL_STEP_TOKENS = 250_000
"""Response tokens up to which a step is JSONL by itself: at 28 bytes each, 7 MB."""


def rollout_file(folder: Path, step: int) -> Path:
    """Where a step's samples lie, in either form; the path of a Parquet file where there is none."""
    jsonl = folder / f"step-{step:08d}.jsonl"
    return jsonl if jsonl.is_file() else jsonl.with_suffix(".parquet")


class RolloutWriter:
    """Writes steps behind the training, one at a time, in a thread: the loop waits only for a writer that falls behind.

    `share` of a step's groups is kept, evenly spaced over them, and files of the newest `keep_steps` steps (0: of all).
    `form` "auto" takes JSONL for steps of at most SMALL_STEP_TOKENS response tokens, Parquet for larger ones.
    """

    def __init__(self, folder: Path, *, share: float = 1.0, keep_steps: int = 0, form: Form = "auto") -> None:
        self.folder, self._form = folder, form
        self._share = share
        self._keep_steps = keep_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout files")
        self._pending: Future[None] | None = None
        self._newest = -1  # the step that is pending or was written last
        self._told = False  # whether somebody knows that it could not be written
        for left in folder.glob(".step-*.partial"):  # by a run that was killed as it wrote
            left.unlink(missing_ok=True)  # or is yet to end, and has just finished it

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        advantage_of: Mapping[int, npt.NDArray[np.float64]] | None = None,
        ratios_of: Mapping[int, Arrays] | None = None,
    ) -> None:
        """Hand a step's groups to the writer, which must be left as they are from now on.

        By the identity of the groups that were trained on, `advantage_of` has their samples' advantages and `ratios_of`
        the ratios [n] of their samples' tokens, NaN where the loss did not read one.
        Raises OSError where the step before could not be written.
        """
        self.flush()
        kept = evenly_kept(groups, self._share)
        rows = [(g, (advantage_of or {}).get(id(g)), (ratios_of or {}).get(id(g))) for g in kept]
        self._pending, self._newest = self._thread.submit(self._write, step, rows), step

    def flush(self, step: int | None = None) -> None:
        """Wait until all that was handed over is on disk, or that up to `step`. Raises OSError where it cannot be.

        Steps before the newest one are on disk already: `write` waits for them. What could not be written is told
        whoever asks: the checkpoint of its step may be waiting for it when the next `write` has met the error.
        """
        if self._pending is None or (step is not None and step < self._newest):
            return
        try:
            self._pending.result()
        except Exception:
            self._told = True
            raise

    def close(self) -> None:
        """Flush, and end the thread. An error that was raised before is not raised again."""
        try:
            if not self._told:
                self.flush()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, rows: Sequence[tuple[Group, Any, Arrays | None]]) -> None:
        path = self.folder / f"step-{step:08d}.{self._form_of(rows)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            if path.suffix == ".jsonl":
                with partial.open("w", encoding="utf-8") as lines:
                    for group, advantages, ratios in rows:
                        for sample in _samples_of(_row(step, group, advantages, ratios)):
                            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")
            else:
                with pq.ParquetWriter(partial, SCHEMA, compression="zstd", use_dictionary=True) as file:
                    for start in range(0, len(rows), ROW_GROUP):
                        file.write_table(_table(step, rows[start : start + ROW_GROUP]))
            flush_to_disk(partial)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"{path} could not be written ({error}): make room, or set train.keep_rollouts to false"
            ) from error
        partial.replace(path)
        flush_to_disk(path.parent)  # checkpoints are, and one of this step says that the file is there
        for other in {".jsonl", ".parquet"} - {path.suffix}:  # of a run before this one resumed
            path.with_suffix(other).unlink(missing_ok=True)
        if self._keep_steps:
            for old in rollout_files(self.folder)[: -self._keep_steps]:
                old.unlink()

    def _form_of(self, rows: Sequence[tuple[Group, Any, Arrays | None]]) -> str:
        if self._form != "auto":
            return self._form
        tokens = sum(int(sample.trained.sum()) for group, _, _ in rows for sample in group.samples)
        return "jsonl" if tokens <= SMALL_STEP_TOKENS else "parquet"


def evenly_kept(groups: Sequence[Group], share: float) -> list[Group]:
    """`share` of the groups, rounded up, evenly spaced; all of them for 1."""
    count = -int(-len(groups) * share // 1)
    return [groups[index * len(groups) // count] for index in range(count)]


def _table(step: int, rows: Sequence[tuple[Group, Any, Arrays | None]]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for group, advantages, ratios in rows:
        for name, value in _row(step, group, advantages, ratios).items():
            columns[name].append(value)
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)


def _row(step: int, group: Group, advantages: Any, ratios: Arrays | None) -> dict[str, Any]:
    head, prompt = len(group.prompt.tokens), group.prompt
    scores: Sequence[Any] = group.scores if group.scores is not None else [None] * len(group.samples)
    return {
        "step": step,
        "prompt_id": prompt.id,
        "data_source": prompt.data_source,
        "prompt": prompt.text,
        "ground_truth": json.dumps(_truth_of(prompt), ensure_ascii=False, default=str),
        "response": list(group.texts),
        "token_ids": [sample.tokens[head:] for sample in group.samples],
        "logprobs": [None if s.logprobs is None else s.logprobs[head:].astype(np.float16) for s in group.samples],
        "ratio": None if ratios is None else [_half(values[head:]) for values in ratios],
        "advantage": None if advantages is None else [float(value) for value in advantages],
        "reward": [None if score is None else score.reward for score in scores],
        "verdict": [None if score is None else score.verdict.value for score in scores],
        "note": ["" if score is None else score.note for score in scores],
        "finish": [sample.finish for sample in group.samples],
        "weight_version": [sample.policy_version for sample in group.samples],
        "version_spans": [[[s.version, s.start - head, s.end - head] for s in x.version_spans] for x in group.samples],
    }


def _truth_of(prompt: Prompt) -> Any:
    """The ground truth itself, wherever it is. What is gone from disk is named instead: samples are kept for people."""
    if not isinstance(prompt.ground_truth, TruthRef):
        return prompt.ground_truth
    try:
        return read_truth(prompt.ground_truth, prompt.data_source).ground_truth
    except TruthReadError as error:
        return str(error)


def _half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Ratios in half precision; those beyond it at its largest number, as nothing here is infinite."""
    limit = np.finfo(np.float16).max
    return np.clip(values, -limit, limit).astype(np.float16)


def rollout_files(folder: Path) -> list[Path]:
    """The files of steps in `folder`, by step, whatever their form."""
    return sorted(path for path in folder.glob("step-*") if path.suffix in {".parquet", ".jsonl"})


def read_samples(path: Path, at_most: int | None = None) -> tuple[int, list[dict[str, Any]]]:
    """How many samples a file holds, and `at_most` of them, evenly spaced: a dictionary each, numbers as lists.

    Lines of JSONL that are no objects are counted and left out.
    Raises OSError where the file cannot be read or is damaged.
    """
    if path.suffix == ".jsonl":
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
        records = [parse_object(lines[index]) for index in evenly(len(lines), at_most)]
        return len(lines), [record for record in records if record is not None]
    try:
        with pq.ParquetFile(path) as file:
            sizes = [len(finishes) for finishes in file.read(columns=["finish"])["finish"].to_pylist()]
            first = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
            wanted = np.array(evenly(int(first[-1]), at_most), dtype=int)
            holders = np.searchsorted(first, wanted, side="right") - 1
            return int(first[-1]), list(_samples(file, holders, wanted - first[holders]))
    except pa.ArrowInvalid as error:
        raise OSError(f"{path} is damaged: {error}") from error


def parse_object(line: str) -> dict[str, Any] | None:
    """One line of JSONL, None where it is no whole JSON object."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _samples(file: Any, groups: npt.NDArray[Any], places: npt.NDArray[Any]) -> Iterator[dict[str, Any]]:
    """The samples at `places` of their groups, row group by row group."""
    for number in range(file.num_row_groups):
        here = np.flatnonzero(groups // ROW_GROUP == number)
        if not len(here):
            continue
        table = file.read_row_group(number)
        for index in here:
            row = table.slice(int(groups[index]) % ROW_GROUP, 1).to_pylist()[0]
            yield _sample_of(row, int(places[index]))


def _samples_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (_sample_of(row, index) for index in range(len(row["finish"])))


def _sample_of(row: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample of a group's row, with plain lists and numbers that JSON can hold."""
    of_group = {name: row[name] for name in _OF_GROUP}
    of_sample: dict[str, Any] = {name: None if row[name] is None else row[name][index] for name in _OF_SAMPLES}
    of_sample |= {name: _readable(of_sample[name]) for name in ("logprobs", "ratio")}
    of_sample["token_ids"] = [int(token) for token in of_sample["token_ids"]]
    return {**of_group, "ground_truth": json.loads(row["ground_truth"]), **of_sample}


def _readable(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [None if value != value else round(float(value), 4) for value in values]


def evenly(size: int, at_most: int | None) -> list[int]:
    """Indices of `at_most` of `size` things, evenly spaced, the first and the last among them."""
    if at_most is None or size <= at_most:
        return list(range(size))
    return [index * (size - 1) // max(at_most - 1, 1) for index in range(at_most)]
