"""Groups as bytes, to be kept in a checkpoint: arrays and JSON in one npz, which holds no code."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.types import Group, ProgramResult, Prompt, Sample, Score, Verdict, VersionSpan


def dump_groups(groups: Sequence[Group]) -> bytes:
    """The groups, graded or not; of a prompt its id alone."""
    samples = [sample for group in groups for sample in group.samples]
    told = [
        {
            "prompt": group.prompt.id,
            "texts": group.texts,
            "scores": None if group.scores is None else [asdict(score) for score in group.scores],
            "samples": [
                {
                    "length": len(sample.tokens),
                    "has_logprobs": sample.logprobs is not None,
                    "has_routes": sample.routes is not None,
                    "policy_version": sample.policy_version,
                    "version_spans": sample.version_spans,
                    "finish": sample.finish,
                }
                for sample in group.samples
            ],
        }
        for group in groups
    ]
    routes = [sample.routes for sample in samples if sample.routes is not None]
    written = io.BytesIO()
    np.savez_compressed(
        written,
        told=np.frombuffer(json.dumps(told).encode("utf-8", "surrogatepass"), dtype=np.uint8),
        tokens=_joined([sample.tokens for sample in samples], np.int32),
        trained=_joined([sample.trained for sample in samples], np.bool_),
        logprobs=_joined([sample.logprobs for sample in samples if sample.logprobs is not None], np.float32),
        routes=np.concatenate(routes) if routes else np.zeros((0, 0, 0), np.uint8),
    )
    return written.getvalue()


def load_groups(content: bytes, find: Callable[[str], Prompt]) -> list[Group]:
    """The groups that `dump_groups` wrote; `find` has the prompt of an id."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        told = json.loads(arrays["told"].tobytes().decode("utf-8", "surrogatepass"))
        tokens, trained, logprobs = arrays["tokens"], arrays["trained"], arrays["logprobs"]
        routes = arrays.get("routes")  # None in files of runs from before there were any
    place = scored = routed = 0
    groups = []
    for group in told:
        samples = []
        for sample in group["samples"]:
            here, place = slice(place, place + sample["length"]), place + sample["length"]
            drawn = None
            if sample["has_logprobs"]:
                drawn, scored = logprobs[scored : scored + sample["length"]].copy(), scored + sample["length"]
            taken = None
            if routes is not None and sample.get("has_routes"):
                taken, routed = routes[routed : routed + sample["length"] - 1].copy(), routed + sample["length"] - 1
            samples.append(
                Sample(
                    tokens=tokens[here].copy(),
                    trained=trained[here].copy(),
                    logprobs=drawn,
                    policy_version=sample["policy_version"],
                    version_spans=tuple(VersionSpan(*span) for span in sample["version_spans"]),
                    finish=sample["finish"],
                    routes=taken,
                )
            )
        scores = group["scores"]
        groups.append(
            Group(
                prompt=find(group["prompt"]),
                samples=samples,
                texts=group["texts"],
                scores=None if scores is None else [_score(score) for score in scores],
            )
        )
    return groups


def with_routes_or_without(group: Group, replayed: bool) -> Group | None:
    """A group as a run takes it that has routes `replayed`, or has not; None where there are none to replay."""
    if replayed:
        return group if all(sample.routes is not None for sample in group.samples) else None
    return replace(group, samples=[replace(sample, routes=None) for sample in group.samples])


def _score(told: dict[str, Any]) -> Score:
    program = told.get("program")
    return Score(
        reward=told["reward"],
        verdict=Verdict(told["verdict"]),
        note=told["note"],
        program=None if program is None else ProgramResult(**program),
        vote=told.get("vote", ""),
    )


def _joined(arrays: Sequence[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    return np.concatenate([np.zeros(0, dtype=dtype), *arrays])
