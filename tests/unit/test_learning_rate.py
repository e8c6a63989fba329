"""The learning rate as a function of the step: every step of a run moves the weights."""

import pytest
import torch

from megatron_klear.config.base import OptimizerConfig
from megatron_klear.mcore.optimizer import learning_rate


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (10, 3), (3, 3)])
def test_the_last_step_moves_weights(decay: str, total: int, warmup: int) -> None:
    settings = OptimizerConfig(learning_rate=1e-3, decay=decay, warmup_steps=warmup)
    rates = [learning_rate(settings, step, total) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) == 1e-3
    if decay != "constant" and total > warmup:
        assert learning_rate(settings, total, total) == 0, "the minimum is reached where the run ends"
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(("decay", "name"), [("cosine", "cosine"), ("linear", "linear")])
def test_rates_are_those_of_transformers(decay: str, name: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=7)
    settings = OptimizerConfig(learning_rate=1.0, decay=decay, warmup_steps=0)
    for step in range(7):
        assert learning_rate(settings, step, 7) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()
