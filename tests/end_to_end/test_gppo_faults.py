"""Faults planted in a run of reinforcement learning: each stops it or is told, by name; none passes in silence."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_rl_run import start, train, write_run

from megatron_klear.errors import UserError
from megatron_klear.rl.advantages import RewardValueError
from megatron_klear.rollout.local.engine import LocalEngine
from megatron_klear.train.weight_sync import WeightsNotArrived

REWARDS = """
import os

def dies(response, truth):
    os._exit(7)

def is_nan(response, truth):
    return float("nan")

def raises(response, truth):
    raise KeyError("no such answer")

def later(fault):
    # Fails on what the model wrote, not on the response that is made up to try the reward.
    return lambda response, truth: 0.0 if "made up" in response else fault(response, truth)

dies_later, is_nan_later, raises_later = later(dies), later(is_nan), later(raises)
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "planted_rewards.py").write_text(REWARDS)
    return write_run(folder)


class Planted(LocalEngine):
    """A rollout engine with a fault, from the second sync on."""

    fault = ""
    syncs = 0

    def load_weights(self, weights, version):
        Planted.syncs += 1
        if self.fault == "stale" and Planted.syncs > 2:
            list(weights)
            weights = []
            self.version = version
            return self._checksums()
        held = super().load_weights(weights, version)
        if self.fault == "corrupted" and Planted.syncs > 2:
            self._decoder.weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
            return self._checksums()
        return held

    def _checksums(self):
        from megatron_klear.rollout.weights.checksum import checksum

        return {"local": {name: checksum(tensor) for name, tensor in self._decoder.weights.items()}}

    def draw(self, prompts, sampling, seed):
        drawn = super().draw(prompts, sampling, seed)
        if self.fault == "empty":
            drawn[1].clear()
        return drawn


def edited(toml: Path, folder: Path, old: str, new: str) -> Path:
    """The settings with a line changed, in a file of `folder`."""
    text = toml.read_text()
    assert text.count(old) == 1
    (folder / "edited.toml").write_text(text.replace(old, new))
    return folder / "edited.toml"


def planted(toml: Path, modules: Path, output: Path, fault: str = "", *flags: str) -> str:
    """Train with the fault; what the run printed."""
    from megatron_klear.train import weight_sync

    Planted.fault = fault
    weight_sync.LocalEngine = Planted
    os.environ["PYTHONPATH"] = str(modules)
    return train(start(toml, "--output", str(output), "--train.steps", "2", *flags))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [("corrupted", "model.layers.1.mlp.up_proj.weight"), ("stale", "model.embed_tokens.weight")],
)
def test_wrong_weights_stop_the_run_with_the_tensor_s_name(toml, tmp_path, ranks, fault: str, tensor: str):
    with pytest.raises(WeightsNotArrived) as info:
        ranks(1, planted, toml, tmp_path, tmp_path / "run", fault)
    assert tensor in str(info.value)
    assert ("1 tensors differ" in str(info.value)) == (fault == "corrupted")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("dies", "grading processes do not start (exit code 7, 3 times in a row)"),
        ("is_nan", "the reward returned nan, which is not finite"),
        ("raises", "KeyError: 'no such answer'"),
    ],
)
def test_rewards_that_fail_are_told_before_anything_is_drawn(toml, tmp_path, ranks, function: str, words: str):
    functions = f'workers = 1\nfunctions = {{"arithmetic" = "planted_rewards:{function}"}}'
    config = edited(toml, tmp_path, "workers = 1", functions)
    with pytest.raises(UserError) as info:
        ranks(1, planted, config, toml.parent, tmp_path / "run")
    assert words in str(info.value)
    assert not (tmp_path / "run" / "rollouts").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("dies_later", "the grading process ended with exit code 7"),
        ("is_nan_later", "the reward returned nan, which is not finite"),
        ("raises_later", "KeyError: 'no such answer'"),
    ],
)
def test_rewards_that_fail_stop_the_run(toml, tmp_path, ranks, function: str, words: str):
    functions = f'workers = 1\nfunctions = {{"arithmetic" = "planted_rewards:{function}"}}'
    config = edited(toml, tmp_path, "workers = 1", functions)
    with pytest.raises(UserError) as info:
        ranks(1, planted, config, toml.parent, tmp_path / "run")
    assert "12 of 12 responses could not be graded" in str(info.value)
    assert "reward.max_error_share" in str(info.value)
    assert words in str(info.value)


def test_an_empty_group_stops_the_run_with_the_prompt_s_name(toml, tmp_path, ranks):
    with pytest.raises(RewardValueError, match=r"prompt \S+ \(data_source arithmetic\) has no samples"):
        ranks(1, planted, toml, tmp_path, tmp_path / "run", "empty")


def test_equal_rewards_are_told_and_leave_the_weights_alone(toml, tmp_path, ranks):
    from megatron_klear.mcore.checkpoints import manifest
    from megatron_klear.mcore.checkpoints.compare import compare_checkpoints

    output = tmp_path / "run"
    told = ranks(1, planted, toml, tmp_path, output, "", "--algorithm.overlong_penalty.factor", "1e-300")[0]
    assert told.count("every group has equal rewards") == 2
    assert [record["step"] for record in records(output)] == [1, 2]
    for record in records(output):
        assert record["zero_advantage_share"] == 1
        assert record["updates"] == record["grad_norm"] == record["loss"] == 0
        assert record["reward_mean"] == -1
    steps = [manifest.step_folder(output / "checkpoints", step) for step in (1, 2)]
    assert not compare_checkpoints(*steps).unequal_tensors


def test_fewer_prompts_than_a_step_takes_are_told(toml, tmp_path, ranks):
    config = edited(toml, tmp_path, "count = 40", "count = 3")
    told = ranks(1, planted, config, tmp_path, tmp_path / "run")[0]
    assert "prompts.sources hold 3 prompts" in told
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]


def test_tokens_that_the_model_lacks_are_told_before_anything_is_opened(toml, tmp_path, ranks, capsys):
    """The tokenizer has 512 tokens; stop tokens are known in a dry run already."""
    folder = tmp_path / "model"
    shutil.copytree(toml.parent / "model", folder)
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"vocab_size": 64}))
    small = ("--model.path", str(folder), "--output", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as refused:
        start(toml, *small, "--sampling.stop_token_ids", "64", "--dry-run")
    assert refused.value.code == 2
    assert "sampling.stop_token_ids names token 64, and the model's vocab_size is 64" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the prompt holds token id \d+, .* has vocab_size 64: tokenizer and model"):
        ranks(1, with_nothing_opened, toml, *small)


def with_nothing_opened(toml: Path, *flags: str) -> None:
    from megatron_klear.train import rl_run

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the model or the rollouts were opened")

    rl_run.Engine = rl_run.open_trainer = opened
    train(start(toml, *flags))
