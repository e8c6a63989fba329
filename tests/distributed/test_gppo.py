"""A rollout step of GPPO: the same numbers in every layout, and REINFORCE where the policy is the sampler's own."""

import numpy as np
import pytest
from rl_cases import largest_difference, take_step
from rl_groups import fixed_groups, gppo_config

from megatron_klear.config.base import ParallelConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.rl.advantages import keep_informative

TOLERANCE = 1e-5
LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 CP2": {"tensor": 2, "context": 2},
    "TP2 PP2 CP2": {"tensor": 2, "pipeline": 2, "context": 2},
    "TP2 PP2 DP2": {"tensor": 2, "pipeline": 2},
}
PROCESSES = {name: ParallelConfig(**layout).model_size for name, layout in LAYOUTS.items()}
PROCESSES |= {"DP2": 2, "TP2 PP2 DP2": 8}
OLD = {
    "recompute": {"old_logprobs": "recompute", "correction": "truncated"},
    "sampler": {"old_logprobs": "sampler", "correction": "none"},
}
UNPACKED = {"tokens_per_microbatch": 48}  # room for one sample of the longest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gppo") / "model"
    return write_tiny_model(folder, "qwen3", TinyShape(tied_embeddings=True), weights=False)


@pytest.fixture(scope="module", params=list(OLD))
def reference(request, model, ranks):
    """What one process makes of the fixed rollouts, by where the old log-probs come from."""
    tables = {"algorithm": OLD[request.param]}
    return tables, ranks(1, take_step, gppo_config(model, tables), fixed_groups())[0]


def compare(outcome, expected) -> None:
    assert len(outcome.stats) == len(expected.stats) == 2
    for found, wanted in zip(outcome.stats, expected.stats, strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=TOLERANCE)
        assert found.num_trained_tokens == wanted.num_trained_tokens
        for region in range(1, 6):
            key = f"clip_region_{region}_tokens"
            assert found.metrics[key] == wanted.metrics[key]
    assert outcome.mismatch == pytest.approx(expected.mismatch, rel=1e-4, abs=1e-6)
    assert largest_difference(outcome.weights, expected.weights) < TOLERANCE
    assert len(outcome.token_ratios) == len(expected.token_ratios)
    for found, wanted in zip(outcome.token_ratios, expected.token_ratios, strict=True):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layout_gives_the_step_of_one_process(model, ranks, reference, layout: str):
    tables, expected = reference
    config = gppo_config(model, tables | {"parallel": LAYOUTS[layout]})
    results = ranks(PROCESSES[layout], take_step, config, fixed_groups())
    assert all(result.stats == results[0].stats for result in results)
    compare(results[0], expected)


@pytest.mark.parametrize("layout", ["1", "CP2", "TP2 PP2 DP2"])
def test_packing_changes_nothing(model, ranks, reference, layout: str):
    tables, expected = reference
    config = gppo_config(model, tables | {"parallel": LAYOUTS.get(layout, {}), "train": UNPACKED})
    compare(ranks(PROCESSES.get(layout, 1), take_step, config, fixed_groups())[0], expected)


def test_the_sampler_s_log_probs_touch_every_clip_region(reference):
    tables, expected = reference
    if tables["algorithm"]["old_logprobs"] == "sampler":
        for region in range(1, 5):
            assert sum(stats.metrics[f"clip_region_{region}_tokens"] for stats in expected.stats) > 0


def test_the_gate_sees_a_different_step(model, ranks, reference):
    tables, expected = reference
    other = {"algorithm": tables["algorithm"] | {"nll_coefficient": 0.11}}
    outcome = ranks(1, take_step, gppo_config(model, other), fixed_groups())[0]
    assert outcome.stats[0].loss != pytest.approx(expected.stats[0].loss, rel=TOLERANCE)
    assert largest_difference(outcome.weights, expected.weights) > TOLERANCE


@pytest.mark.parametrize("layout", ["1", "TP2", "PP2", "CP2", "DP2"])
def test_first_update_is_reinforce(model, ranks, layout: str):
    """At the first update every ratio is 1: GPPO's gradient is REINFORCE's, and nothing is clipped."""
    outcomes = {}
    for kind in ("gppo", "reinforce"):
        tables = {
            "loss": {"kind": kind},
            "algorithm": {"prompts_per_update": 4, "nll_coefficient": 0.0, "correction": "none"},
            "parallel": LAYOUTS.get(layout, {}),
        }
        outcomes[kind] = ranks(PROCESSES.get(layout, 1), take_step, gppo_config(model, tables), fixed_groups())[0]
    gppo, reinforce = outcomes["gppo"], outcomes["reinforce"]
    assert float(gppo.ratios.max()) < 1e-5
    assert [gppo.stats[0].metrics[f"clip_region_{region}_tokens"] for region in range(1, 5)] == [0.0] * 4
    assert gppo.stats[0].grad_norm == pytest.approx(reinforce.stats[0].grad_norm, rel=TOLERANCE)
    assert gppo.stats[0].grad_norm > 0
    assert largest_difference(gppo.weights, reinforce.weights) < TOLERANCE


def test_token_ratios_are_those_of_the_samples_own_tokens(reference):
    tables, expected = reference
    for group, of_group in zip(keep_informative(fixed_groups()), expected.token_ratios, strict=True):
        for sample, ratios in zip(group.samples, of_group, strict=True):
            np.testing.assert_array_equal(np.isnan(ratios), ~sample.trained)
    first, second = (np.concatenate([*expected.token_ratios[i], *expected.token_ratios[i + 1]]) for i in (0, 2))
    if tables["algorithm"]["old_logprobs"] == "recompute":
        np.testing.assert_allclose(first[~np.isnan(first)], 1, atol=1e-5)
        assert np.nanmax(np.abs(np.log(second))) == pytest.approx(float(expected.ratios[1]), rel=1e-3)


def test_later_updates_are_off_policy(reference):
    tables, expected = reference
    if tables["algorithm"]["old_logprobs"] == "recompute":
        assert float(expected.ratios[0]) < 1e-5 < float(expected.ratios[1])
