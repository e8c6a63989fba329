"""Validation keeps the samples that its accuracy is made of."""

from concurrent.futures import Future
from dataclasses import astuple

from rl_groups import fixed_groups, score

from megatron_klear.config.rl import ValidationConfig
from megatron_klear.orchestrator.validation import Validator
from megatron_klear.rewards.scoring import Graded
from megatron_klear.rewards.votes import vote_of
from megatron_klear.runs.rollout_files import RolloutWriter, read_samples, rollout_file
from megatron_klear.statistics.intervals import benchmark_interval, run_to_run
from megatron_klear.statistics.metrics import maj_at_k
from megatron_klear.types import Verdict


class Stub:
    """Sampler and grader in one: hands out graded groups."""

    def __init__(self):
        self.groups = fixed_groups()

    def draw(self, prompts, sampling, seed, ended):
        assert [prompt.id for prompt in prompts] == [group.prompt.id for group in self.groups]
        for group in reversed(self.groups):
            ended(group, ())
        return self.groups

    def begin(self, groups, begun):
        future = Future()
        future.set_result(Graded(groups=groups))
        return future

    def check(self, graded):
        self.checked = True


def test_kept_samples_tell_the_accuracy_that_is_reported(tmp_path):
    stub = Stub()
    prompts = [group.prompt for group in stub.groups]
    validator = Validator(config=ValidationConfig(), prompts=prompts, kept=RolloutWriter(tmp_path / "validation"))
    found = validator.measure(stub, stub, step=7)
    rows = read_samples(rollout_file(tmp_path / "validation", 7))[1]
    assert {row["step"] for row in rows} == {7}
    assert {row["prompt_id"] for row in rows} == {prompt.id for prompt in prompts}
    assert sum(row["verdict"] == "right" for row in rows) / len(rows) == found["accuracy"]
    assert 0 < found["accuracy"] < 1


def test_its_figures_are_those_of_an_evaluation():
    stub = Stub()
    for index, group in enumerate(stub.groups):
        group.texts[:] = [f"The answer is \\boxed{{{index if n % 3 else n}}}." for n in range(4)]
    found = Validator(config=ValidationConfig(), prompts=[g.prompt for g in stub.groups]).measure(stub, stub, step=7)
    right = [[score.verdict is Verdict.RIGHT for score in group.scores] for group in stub.groups]
    counts = [sum(of_prompt) for of_prompt in right]
    interval = benchmark_interval(counts, 4)
    assert (found["accuracy"], found["accuracy_low"], found["accuracy_high"]) == astuple(interval)
    assert found["accuracy_run_to_run"] == run_to_run(counts, 4)
    assert found["pass_at_k"] == sum(count > 0 for count in counts) / 4
    votes = [
        [
            "right" if is_right else vote_of(text, score(-1.0))
            for text, is_right in zip(group.texts, of_prompt, strict=True)
        ]
        for group, of_prompt in zip(stub.groups, right, strict=True)
    ]
    majorities = [maj_at_k(v, r) for v, r in zip(votes, right, strict=True)]
    assert found["majority_at_k"] == sum(majorities) / 4
    assert 0 < found["majority_at_k"] < 1


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path):
    stub = Stub()
    assert Validator(config=ValidationConfig(), prompts=[g.prompt for g in stub.groups]).measure(stub, stub, step=0)
    assert list(tmp_path.iterdir()) == []
