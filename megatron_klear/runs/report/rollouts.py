"""The rollouts that a report shows: a few of each of some steps, short enough for one page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from megatron_klear.runs.report.runs import Run
from megatron_klear.runs.report.token_texts import Decoder, open_tokenizer, token_texts
from megatron_klear.runs.rollout_files import evenly, read_samples, rollout_files

MAX_STEPS, MAX_PARSED = 40, 64
HEAD_TOKENS, TAIL_TOKENS = 700, 500
MAX_TEXT = 8000
T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(value: Any) -> str:
    """JSON that may stand in an HTML script element: no `<` in it, no lone surrogate, no NaN."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _SURROGATE.sub("\ufffd", text)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRollouts:
    """Samples kept of one step, as data for the page; `total` counts all that the run wrote."""

    step: int
    total: int
    samples: list[dict[str, Any]]


def read_rollouts(run: Run, samples_per_step: int, budget_bytes: int) -> list[StepRollouts]:
    """Samples of evenly spaced steps, at most `samples_per_step` of each and all together in `budget_bytes`.

    Of a step, samples with different verdicts come first; of a run, every step gets its first sample before any gets
    its second. What is unreadable or missing is said in the run's notes.
    """
    paths = rollout_files(run.folder / "rollouts")
    if not paths:
        if run.kind == "rl":
            run.notes.append("There are no rollouts to read (no rollouts/step-*.parquet).")
        return []
    chosen = [paths[index] for index in evenly(len(paths), MAX_STEPS)]
    if len(chosen) < len(paths):
        run.notes.append(f"Rollouts of {len(chosen)} of {len(paths)} steps are shown.")
    tokenizer = open_tokenizer(run)
    steps = [_read_step(path, samples_per_step, tokenizer, run.notes) for path in chosen]
    if any("tokens" not in sample for step in steps for sample in step.samples):
        where = run.settings.get("model.path", "unknown, without config.toml")
        run.notes.append(f"Responses are not cut into tokens: the model's tokenizer.json is not there ({where}).")
    waves = zip_longest(*([(step, sample) for sample in step.samples] for step in steps))
    kept: dict[int, list[dict[str, Any]]] = {step.step: [] for step in steps}
    spent = 0
    for pair in chain.from_iterable(waves):
        if pair is None:
            continue
        step, sample = pair
        size = len(to_json(sample).encode())
        if spent + size <= budget_bytes:
            spent += size
            kept[step.step].append(sample)
    return [StepRollouts(step=s.step, total=s.total, samples=kept[s.step]) for s in steps if kept[s.step]]


def _read_step(path: Path, samples_per_step: int, tokenizer: Decoder | None, notes: list[str]) -> StepRollouts:
    try:
        total, records = read_samples(path, MAX_PARSED)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        total, records = 0, []
    if len(records) < min(total, MAX_PARSED):
        notes.append(f"Some lines of {path.name} are not readable and were left out.")
    step = int(re.sub(r"\D", "", path.stem) or 0)
    samples = [_shorten(record, tokenizer) for record in _varied(records)[:samples_per_step]]
    return StepRollouts(step=step, total=total, samples=samples)


def _varied(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of each verdict in turn, in file order within a verdict."""
    by_verdict: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_verdict.setdefault(str(record.get("verdict")), []).append(record)
    turns = chain.from_iterable(zip_longest(*by_verdict.values()))
    return [record for record in turns if record is not None]


def _shorten(record: Mapping[str, Any], tokenizer: Decoder | None) -> dict[str, Any]:
    """A sample for the page: numbers of a few digits, long responses without their middle.

    It has `tokens` where the record has them or the tokenizer makes them of its `token_ids`, else `response`.
    """
    ids, tokens = record.get("token_ids"), record.get("tokens")
    whole = tokens if isinstance(tokens, list) else ids if isinstance(ids, list) else []
    count = len(whole)
    cut = count > HEAD_TOKENS + TAIL_TOKENS
    left_out = (HEAD_TOKENS, count - TAIL_TOKENS) if cut else (count, count)
    sample: dict[str, Any] = {
        "promptId": _text(record, "prompt_id"),
        "source": _text(record, "data_source"),
        "prompt": _middle_out(_text(record, "prompt")),
        "logprobs": _numbers(record.get("logprobs"), count, left_out),
        "ratio": _numbers(record.get("ratio"), count, left_out),
        "numTokens": count,
        "cutAt": left_out[0] if cut else None,
        "advantage": _number(record.get("advantage")),
        "reward": _number(record.get("reward")),
        "verdict": _text(record, "verdict"),
        "note": _middle_out(_text(record, "note")),
        "finish": _text(record, "finish"),
        "version": _number(record.get("weight_version")),
        "wanted": _middle_out(_text(record, "ground_truth")),
    }
    head, tail = whole[: left_out[0]], whole[left_out[1] :]
    if isinstance(tokens, list):
        sample["tokens"] = [str(token) for token in head + tail]
    elif tokenizer is not None and whole:
        sample["tokens"] = token_texts(tokenizer, head) + token_texts(tokenizer, tail)
    response = _text(record, "response")
    if cut or response != "".join(sample.get("tokens", ())):
        sample["response"] = _middle_out(response)
    return sample


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return "" if value is None else str(value)


def _middle_out(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def _numbers(values: Any, count: int, left_out: tuple[int, int]) -> list[float | None] | None:
    """One number a token, or None where the sample has no such list or one of another length."""
    if not isinstance(values, list) or len(values) != count or not count:
        return None
    return [_number(value) for value in values[: left_out[0]] + values[left_out[1] :]]


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
