"""Validation keeps the samples that its accuracy is made of."""

from rl_groups import fixed_groups

from megatron_klear.config.rl import ValidationConfig
from megatron_klear.orchestrator.validation import Validator
from megatron_klear.rewards.scoring import Graded
from megatron_klear.runs.rollout_files import RolloutWriter, read_samples, rollout_file


class Stub:
    """Sampler and grader in one: hands out graded groups."""

    def __init__(self):
        self.groups = fixed_groups()

    def draw(self, prompts, sampling, seed):
        assert [prompt.id for prompt in prompts] == [group.prompt.id for group in self.groups]
        return self.groups

    def grade(self, groups):
        return Graded(groups=groups)


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


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path):
    stub = Stub()
    assert Validator(config=ValidationConfig(), prompts=[g.prompt for g in stub.groups]).measure(stub, stub, step=0)
    assert list(tmp_path.iterdir()) == []
