"""Settings of reinforcement learning: losses as tables, checks across tables."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_klear.config.read import SettingsError, load
from megatron_klear.config.rl import GPPOConfig, build_loss
from megatron_klear.rl.losses import GPPO, GSPO, PPO, FunctionLoss

MINIMAL = """
output = "run"
[model]
path = "model"
[prompts]
sources = [{ generator = "arithmetic" }]
"""


def own_loss(logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
    """A loss that a user might bring."""
    assert advantages is not None
    return -advantages * logprobs


def config(tmp_path: Path, extra: str = "", *flags: str) -> GPPOConfig:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL + extra)
    return load(GPPOConfig, ["--config", str(path), *flags])


def test_the_default_is_the_paper(tmp_path: Path):
    run = config(tmp_path)
    assert build_loss(run.loss) == GPPO(clip_low=0.2, clip_high=0.28)
    assert (run.algorithm.prompts_per_step, run.algorithm.prompts_per_update) == (128, 16)
    assert run.algorithm.nll_coefficient == 0.1


def test_a_loss_is_a_table_of_its_own(tmp_path: Path):
    run = config(tmp_path, '[loss]\nkind = "ppo"\nclip_low = 0.1\nclip_high = 0.3\n')
    assert build_loss(run.loss) == PPO(clip_low=0.1, clip_high=0.3)
    assert isinstance(build_loss(config(tmp_path, '[loss]\nkind = "gspo"\n').loss), GSPO)
    assert build_loss(config(tmp_path, "", "--loss.kind", "gppo", "--loss.clip_high", "0.5").loss) == GPPO(
        clip_high=0.5
    )


def test_a_loss_of_ones_own(tmp_path: Path):
    run = config(tmp_path, '[loss]\nkind = "custom"\npath = "test_rl_config:own_loss"\n')
    loss = build_loss(run.loss)
    assert isinstance(loss, FunctionLoss)
    values = loss(torch.tensor([-1.0]), None, torch.tensor([2.0]))
    assert values.tolist() == [2.0]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ('[loss]\nkind = "gppo"\nclip_low = 2.0\n', "clip_low 2.0"),
        ('[loss]\nkind = "gppo"\nclip = 0.2\n', "loss.clip"),
        ('[loss]\nkind = "grpo"\n', "loss.kind is 'grpo'"),
        ('[loss]\nkind = "custom"\npath = "no_such_module:Loss"\n', "no_such_module"),
        ("[algorithm]\nprompts_per_step = 30\n", "prompts_per_update"),
        ("[sampling]\nmax_tokens = 40000\n", "a sample must fit in one row"),
        ("[parallel]\ncontext = 3\n", "train.segment_multiple 64"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, extra: str, told: str):
    with pytest.raises(SettingsError) as caught:
        config(tmp_path, extra)
    assert told in str(caught.value)


def test_a_ray_address_belongs_to_ray(tmp_path: Path):
    assert config(tmp_path, "", "--reward.backend", "ray", "--reward.ray_address", "auto").reward.ray_address == "auto"
    with pytest.raises(SettingsError, match=r'reward\.ray_address .*is for reward\.backend = "ray"'):
        config(tmp_path, "", "--reward.ray_address", "node-1:6379")
    with pytest.raises(SettingsError, match="give host:port of the Ray itself"):
        config(tmp_path, "", "--reward.backend", "ray", "--reward.ray_address", "ray://node-1:10001")


def test_ray_that_is_not_installed_is_told_before_a_run(tmp_path):
    from rl_groups import gppo_config

    from megatron_klear.config.checks import check_grading

    config = gppo_config(tmp_path / "model", {"reward": {"backend": "ray"}})
    assert "megatron-klear[ray]" in check_grading(config, lambda module: False)[0]
    assert check_grading(config, lambda module: True) == []
    assert check_grading(gppo_config(tmp_path / "model"), lambda module: False) == []
