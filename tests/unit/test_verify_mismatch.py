"""Each cause of a train/sampler mismatch is planted and named, and no other cause with it."""

import numpy as np
import pytest

from megatron_klear.verify.mismatch import Evidence, diagnose

TOLERANCE = 1e-4
GENERATOR = np.random.default_rng(0)
LOGITS = [GENERATOR.normal(size=(length, 50)) * 3 for length in (40, 25, 60, 33)]
TOKENS = [np.array([GENERATOR.integers(0, 50) for _ in rows]) for rows in LOGITS]


def scores(temperature: float = 1.0, noise: float = 0.0, top_p: float = 1.0) -> list[np.ndarray]:
    """Log-probs of likely tokens under made-up logits."""
    found = []
    for seed, (logits, _) in enumerate(zip(LOGITS, TOKENS, strict=True)):
        z = logits / temperature
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        best = logits.argmax(-1)
        if top_p < 1:
            ordered = -np.sort(-np.exp(logp), axis=-1)
            kept = np.where((ordered.cumsum(-1) - ordered) < top_p, ordered, 0).sum(-1, keepdims=True)
            logp = logp - np.log(kept)
        values = logp[np.arange(len(best)), best]
        found.append(values + noise * np.random.default_rng(seed).normal(size=len(values)))
    return found


def evidence(sampler, **changes) -> Evidence:
    base = {
        "trainer": scores(0.8),
        "temperature": 0.8,
        "at_temperature": {t: scores(t) for t in (0.6, 0.8, 1.0)},
        "exact": scores(0.8),
        "round_trip": [True] * 4,
    }
    return Evidence(sampler=sampler, **(base | changes))


def found(given: Evidence) -> list[str]:
    return [finding.cause for finding in diagnose(given, TOLERANCE) if finding.verdict == "found"]


def test_nothing_is_found_where_they_agree():
    assert found(evidence(scores(0.8, noise=1e-6))) == []
    assert all(finding.verdict == "clear" for finding in diagnose(evidence(scores(0.8)), TOLERANCE))


@pytest.mark.parametrize("by", [1, -1])
def test_shift_by_one(by: int):
    assert found(evidence([np.roll(values, by) for values in scores(0.8)])) == ["shift by one"]


@pytest.mark.parametrize("wrong", [1.0, 0.6])
def test_temperature(wrong: float):
    assert found(evidence(scores(wrong))) == ["temperature"]


def test_top_p():
    assert found(evidence(scores(0.8, top_p=0.7), top_p=0.7)) == ["top-p or top-k"]


def test_stale_weights():
    named = diagnose(evidence(scores(0.8), stale=["lm_head.weight"]), TOLERANCE)
    assert [finding.detail for finding in named if finding.verdict == "found"] == ["lm_head.weight"]


def test_tokenisation():
    sampler = scores(0.8)
    sampler[2] = sampler[2] + np.where(np.arange(60) % 2, 2.0, -2.0)
    assert found(evidence(sampler, round_trip=[True, True, False, True])) == ["tokenisation"]


def test_dtype():
    assert found(evidence(scores(0.8, noise=5e-3))) == ["dtype"]
    assert found(evidence(scores(0.8), trainer=scores(0.8, noise=5e-3))) == ["dtype"]


def test_an_unknown_cause_is_not_guessed():
    assert found(evidence(scores(0.8, noise=1.0))) == []


def test_what_was_not_scored_is_not_tested():
    given = Evidence(sampler=scores(), trainer=scores(), temperature=1.0)
    not_tested = {finding.cause for finding in diagnose(given, TOLERANCE) if finding.verdict == "not tested"}
    assert not_tested == {"temperature", "tokenisation", "dtype"}
