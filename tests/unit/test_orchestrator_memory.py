"""What the orchestrator holds of a step, and what the plan says of it."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from rl_groups import fixed_groups, gppo_config

from megatron_klear.config.plan import most_groups
from megatron_klear.orchestrator.feed import StepGroups
from megatron_klear.orchestrator.orchestrator import Orchestrator
from megatron_klear.runs.log import RunLog


def test_a_steps_samples_are_let_go_before_as_much_is_drawn_again():
    held = []

    class Feed:
        def next_step(self, number):
            assert not [tokens for tokens in held if tokens() is not None]
            (group,) = [replace(group, scores=list(group.scores)) for group in fixed_groups(1, 2)]
            held[:] = [weakref.ref(sample.tokens) for sample in group.samples]
            return StepGroups(chosen=[group], graded=[group], num_informative=1)

    orchestrator = object.__new__(Orchestrator)
    orchestrator._feed, orchestrator._log = Feed(), RunLog()
    for number in range(2):
        assert len(orchestrator.next_step(number).numbers.lengths) == 2
        assert len(orchestrator.arrays([[0], [1]])) == 2


@pytest.mark.parametrize(
    ("mode", "ahead"),
    [("synchronous", 0), ("one_step_off", 8), ("asynchronous", 2 * 4)],
)
def test_the_plan_counts_rounds_what_is_drawn_ahead_and_what_is_given_out(mode: str, ahead: int):
    algorithm = {"prompts_per_step": 4, "generated_prompts": 8, "max_generation_rounds": 3}
    rollout = {"kind": "vllm", "mode": mode} | ({"max_staleness": 2} if mode == "asynchronous" else {})
    config = gppo_config(Path("model"), {"algorithm": algorithm, "rollout": rollout})
    assert most_groups(config) == 3 * 8 + ahead + 2 * 4
