"""Why the sampler's log-probs are not the trainer's: one verdict a cause, from numbers already gathered.

Pure functions over per-sequence arrays of the response tokens; `verify_rollouts` gathers them from a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Values = Sequence[npt.NDArray[np.floating]]
_EXPLAINED = 0.1
"""A cause explains a mismatch when it leaves no more than this share of it."""
_ROUNDING_NATS = 0.1
"""Mean difference up to which rounding may be the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Log-probs of the same response tokens, a list of arrays [n_i] by sequence."""

    sampler: Values
    trainer: Values
    """At the temperature of the run, and with the sampler's routes replayed where the run does."""
    temperature: float
    at_temperature: Mapping[float, Values] = field(default_factory=dict)
    """The trainer's at other temperatures."""
    rerouted: Values | None = None
    """The trainer's with the sampler's routes where the run does not replay them, and with its own where it does."""
    is_replayed: bool = False
    exact: Values | None = None
    """From the trainer's weights in fp32 throughout."""
    top_p: float = 1.0
    top_k: int = 0
    round_trip: Sequence[bool] | None = None
    """Whether decoding and encoding a response again gives its tokens."""
    stale: Sequence[str] = ()
    """What of the sampler's weights is not the trainer's: tensors, or versions of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A verdict on one cause."""

    cause: str
    verdict: Literal["found", "clear", "not tested"]
    detail: str


def mean_difference(a: Values, b: Values) -> float:
    """Mean absolute difference over all tokens; 0 without any."""
    differences = np.concatenate([np.abs(x.astype(np.float64) - y) for x, y in zip(a, b, strict=True)] or [np.zeros(0)])
    return float(differences.mean()) if len(differences) else 0.0


def diagnose(evidence: Evidence, tolerance: float) -> list[Finding]:
    """A finding for every cause; all are clear (stale weights apart) where the mean difference is within `tolerance`.

    Causes leave traces of their own: a shift or another temperature makes the numbers equal again when it is undone,
    top-p and top-k only ever raise the sampler's, stale weights are seen in checksums.
    """
    total = mean_difference(evidence.sampler, evidence.trainer)
    if not np.isfinite(total):
        total = np.inf
    enough = max(tolerance, _EXPLAINED * total)
    matters = total > tolerance
    exact = [_shift(evidence, enough, matters), _temperature(evidence, enough, matters)]
    undone = any(finding.verdict == "found" for finding in exact)  # a lower temperature raises likely tokens too
    findings = [
        _stale(evidence),
        *exact,
        _truncation(evidence, tolerance, matters and not undone),
        _tokenisation(evidence, tolerance, total, matters),
    ]
    if evidence.rerouted is not None:
        findings.append(_routing(evidence, evidence.rerouted, enough, matters))
    elsewhere = any(finding.verdict == "found" for finding in findings)
    return [*findings, _dtype(evidence, total, matters and not elsewhere)]


def _finding(cause: str, found: bool, detail: str) -> Finding:
    return Finding(cause=cause, verdict="found" if found else "clear", detail=detail)


def _stale(evidence: Evidence) -> Finding:
    named = ", ".join(evidence.stale[:5]) + (f" and {len(evidence.stale) - 5} more" if len(evidence.stale) > 5 else "")
    return _finding("stale weights", bool(evidence.stale), named or "checksums and versions are the trainer's")


def _shift(evidence: Evidence, enough: float, matters: bool) -> Finding:
    """The sampler's entry k against the trainer's k + 1 and k - 1."""
    later = mean_difference([v[:-1] for v in evidence.sampler], [v[1:] for v in evidence.trainer])
    earlier = mean_difference([v[1:] for v in evidence.sampler], [v[:-1] for v in evidence.trainer])
    best = min(later, earlier)
    long_enough = any(len(values) > 2 for values in evidence.sampler)
    side = "after" if later <= earlier else "before"
    detail = f"against the trainer's one token {side}: mean {best:.2e}"
    return _finding("shift by one", matters and long_enough and best <= enough, detail)


def _temperature(evidence: Evidence, enough: float, matters: bool) -> Finding:
    others = {t: values for t, values in evidence.at_temperature.items() if t != evidence.temperature}
    if not others:
        return Finding(cause="temperature", verdict="not tested", detail="no other temperature was scored")
    left = {t: mean_difference(evidence.sampler, values) for t, values in others.items()}
    best = min(left, key=left.__getitem__)
    detail = f"closest other temperature {best:g}: mean {left[best]:.2e}; the run scores at {evidence.temperature:g}"
    return _finding("temperature", matters and left[best] <= enough, detail)


def _truncation(evidence: Evidence, tolerance: float, matters: bool) -> Finding:
    """Renormalised over a kept mass m <= 1, every log-prob is higher by -log m."""
    raised = np.concatenate(
        [s.astype(np.float64) - t for s, t in zip(evidence.sampler, evidence.trainer, strict=True)] or [np.zeros(0)]
    )
    if not len(raised) or not np.isfinite(raised).all():
        return _finding("top-p or top-k", False, "not all differences are finite")
    never_lower = float(raised.min()) >= -10 * tolerance
    kept = float(np.exp(-raised).mean())
    detail = f"mass kept, were it the cause: mean {kept:.4f} (top_p {evidence.top_p:g}, top_k {evidence.top_k})"
    found = matters and never_lower and float(raised.mean()) > tolerance and len(raised) > 1
    return _finding("top-p or top-k", found, detail)


def _tokenisation(evidence: Evidence, tolerance: float, total: float, matters: bool) -> Finding:
    """Found where the responses that do not round-trip hold the mismatch and the others have none."""
    cause = "tokenisation"
    if evidence.round_trip is None:
        return Finding(cause=cause, verdict="not tested", detail="no tokenizer")
    marked = list(zip(evidence.sampler, evidence.trainer, evidence.round_trip, strict=True))
    whole = [(s, t) for s, t, same in marked if same]
    changed = len(marked) - len(whole)
    among = mean_difference([s for s, _ in whole], [t for _, t in whole])
    detail = f"{changed} of {len(marked)} responses change when decoded and encoded; the others: mean {among:.2e}"
    return _finding(cause, matters and changed > 0 and bool(whole) and among <= max(tolerance, 0.1 * total), detail)


def _routing(evidence: Evidence, rerouted: Values, enough: float, matters: bool) -> Finding:
    """Found where the same experts make the numbers equal again."""
    other = mean_difference(evidence.sampler, rerouted)
    if evidence.is_replayed:
        detail = f"the sampler's experts are replayed; with the trainer's own: mean {other:.2e}"
        return _finding("routing", False, detail)
    detail = f'with the sampler\'s experts, as algorithm.router_replay = "sampler" has it: mean {other:.2e}'
    return _finding("routing", matters and other <= enough, detail)


def _dtype(evidence: Evidence, total: float, matters: bool) -> Finding:
    cause = "dtype"
    if evidence.exact is None:
        return Finding(cause=cause, verdict="not tested", detail="no fp32 scores")
    sampler, trainer = (mean_difference(values, evidence.exact) for values in (evidence.sampler, evidence.trainer))
    detail = f"from fp32: sampler {sampler:.2e}, trainer {trainer:.2e}"
    return _finding(cause, matters and total <= _ROUNDING_NATS and max(sampler, trainer) >= total / 2, detail)
