"""The samples of every rollout step as JSONL, one object a sample, to be read later by people and by the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_klear.toml_writer import write_text_atomically
from megatron_klear.types import Group


def rollout_file(folder: Path, step: int) -> Path:
    """Where a step's samples lie."""
    return folder / f"step-{step:08d}.jsonl"


def write_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    advantage_of: Mapping[int, npt.NDArray[np.float64]] | None = None,
    ratios_of: Mapping[int, Sequence[npt.NDArray[np.float32]]] | None = None,
) -> None:
    """Write a step's groups.

    By the identity of the groups that were trained on, `advantage_of` has their samples' advantages and `ratios_of` the
    ratios [n] of their samples' tokens, NaN where the loss did not read one.
    """
    lines = []
    for group in groups:
        advantages, ratios = (advantage_of or {}).get(id(group)), (ratios_of or {}).get(id(group))
        for index, (sample, text) in enumerate(zip(group.samples, group.texts, strict=True)):
            head = len(group.prompt.tokens)
            score = group.scores[index] if group.scores is not None else None
            lines.append(
                json.dumps(
                    {
                        "step": step,
                        "prompt_id": group.prompt.id,
                        "data_source": group.prompt.data_source,
                        "prompt": group.prompt.text,
                        "response": text,
                        "token_ids": sample.tokens[head:].tolist(),
                        "logprobs": None if sample.logprobs is None else _numbers(sample.logprobs[head:]),
                        "ratio": None if ratios is None else _numbers(ratios[index][head:]),
                        "ground_truth": group.prompt.ground_truth,
                        "advantage": None if advantages is None else float(advantages[index]),
                        "reward": None if score is None else score.reward,
                        "verdict": None if score is None else score.verdict.value,
                        "note": "" if score is None else score.note,
                        "finish": sample.finish,
                        "weight_version": sample.policy_version,
                        "version_spans": [
                            [span.version, span.start - head, span.end - head] for span in sample.version_spans
                        ],
                    },
                    ensure_ascii=False,
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(rollout_file(folder, step), "\n".join(lines) + "\n")


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.tolist()]
