"""The terms beside the policy loss, every kind of loss, and a row of 32K tokens."""

import numpy as np
import pytest
from rl_cases import largest_difference, take_step
from rl_groups import fixed_groups, gppo_config, sample, score

from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.types import Group, Prompt

LONG = 32768
ONE_UPDATE = {"prompts_per_update": 4, "nll_coefficient": 0.0, "correction": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terms") / "model"
    return write_tiny_model(folder, "qwen3", TinyShape(num_layers=2), weights=False)


def outcome_of(ranks, model, algorithm=None, repeats=1, **tables):
    config = gppo_config(model, {"algorithm": ONE_UPDATE | (algorithm or {}), **tables})
    return ranks(1, take_step, config, fixed_groups(), repeats)[0]


def test_kl_to_the_start_begins_at_zero_and_grows(ranks, model):
    plain = outcome_of(ranks, model, repeats=3)
    pulled = outcome_of(ranks, model, {"kl_coefficient": 5.0}, repeats=3)
    assert pulled.stats[0].loss == pytest.approx(plain.stats[0].loss, abs=1e-5)
    assert pulled.stats[0].grad_norm == pytest.approx(plain.stats[0].grad_norm, rel=1e-4)
    # On-policy the loss is the mean advantage, the same in both, so what is left is the KL, which is positive.
    for with_kl, without in zip(pulled.stats[1:], plain.stats[1:], strict=True):
        assert with_kl.loss > without.loss + 1e-5
    assert largest_difference(pulled.weights, plain.weights) > 1e-4


def test_entropy_bonus_raises_the_entropy(ranks, model):
    plain = outcome_of(ranks, model, repeats=4)
    bonus = outcome_of(ranks, model, {"entropy_coefficient": 5.0}, repeats=4)
    assert bonus.stats[0].metrics["entropy"] == pytest.approx(plain.stats[0].metrics["entropy"], rel=1e-6)
    assert bonus.stats[0].loss == pytest.approx(plain.stats[0].loss - 5 * plain.stats[0].metrics["entropy"], rel=1e-5)
    assert bonus.stats[-1].metrics["entropy"] > plain.stats[-1].metrics["entropy"]


@pytest.mark.parametrize("kind", ["gppo", "ppo", "cispo", "capped_cispo", "reinforce", "gspo", "gmpo", "nll"])
def test_every_kind_of_loss_takes_a_step(ranks, model, kind: str):
    outcome = outcome_of(ranks, model, {"prompts_per_update": 2}, loss={"kind": kind})
    assert len(outcome.stats) == 2
    for stats in outcome.stats:
        assert np.isfinite(stats.loss)
        assert stats.grad_norm > 0
        assert not stats.skipped


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "gmpo", "clip_low": 1e-3, "clip_high": 1e-3},
        {"kind": "clip_cov", "share": 0.05, "cov_low": 0.0},
        {"kind": "kl_cov", "share": 0.05},
    ],
    ids=lambda loss: loss["kind"],
)
def test_losses_over_a_whole_update_are_the_same_in_other_layouts(ranks, model, loss):
    """The second update is off-policy; which tokens are chosen does not depend on the rows they lie in."""
    tables = {"algorithm": {"prompts_per_update": 2, "nll_coefficient": 0.0, "correction": "none"}, "loss": loss}
    alone = ranks(1, take_step, gppo_config(model, tables), fixed_groups())[0]
    split = {"parallel": {"context": 2}, "train": {"tokens_per_microbatch": 64}}
    for found in ranks(4, take_step, gppo_config(model, tables | split), fixed_groups()):
        for one, other in zip(found.stats, alone.stats, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-7)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    plain = {"kind": "gspo"} if loss["kind"] == "gmpo" else {"kind": "ppo"}
    other = ranks(1, take_step, gppo_config(model, tables | {"loss": plain}), fixed_groups())[0]
    assert other.stats[1].grad_norm != pytest.approx(alone.stats[1].grad_norm, rel=1e-3), "it changes nothing"


def long_group() -> Group:
    """One sequence of 32K tokens and two short ones."""
    generator = np.random.default_rng(0)
    prompt = Prompt(id="long", data_source="arithmetic", tokens=np.arange(8, dtype=np.int32), text="", ground_truth="")
    lengths = [LONG - 8, 100, 20]
    drawn = [sample(prompt, generator.integers(0, 512, size=length)) for length in lengths]
    return Group(prompt=prompt, samples=drawn, texts=[""] * 3, scores=[score(r) for r in (1.0, -1.0, 1.0)])


@pytest.mark.slow
def test_a_step_over_a_32k_response(ranks, tmp_path):
    """CP2: a row filled by one sequence of 32768 tokens, and one of short sequences."""
    shape = TinyShape(num_layers=2, hidden_size=32, ffn_hidden_size=64, head_dim=8, max_positions=LONG)
    model = write_tiny_model(tmp_path / "model", "qwen3", shape, weights=False)
    tables = {
        "parallel": {"context": 2},
        "sampling": {"max_tokens": LONG - 16},
        "algorithm": {"prompts_per_step": 1, "prompts_per_update": 1},
        "train": {"tokens_per_microbatch": LONG},
        "recompute": {"granularity": "full"},
    }
    outcome = ranks(2, take_step, gppo_config(model, tables), [long_group()], timeout_seconds=900.0)[0]
    (stats,) = outcome.stats
    assert stats.num_trained_tokens == LONG - 8 + 120
    assert stats.num_tokens == LONG + 128 + 8
    assert np.isfinite(stats.loss)
    assert stats.grad_norm > 0
    assert float(outcome.ratios.max()) < 1e-4
