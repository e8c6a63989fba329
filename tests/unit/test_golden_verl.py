"""Losses, averages, estimators and KL forms give the figures of verl's functions on the same inputs.

The numbers were printed by verl (github.com/verl-project/verl at 1dda039b), verl/trainer/ppo/core_algos.py, in float64:
`compute_policy_loss_*`, `agg_loss`, `compute_*_outcome_advantage` and `kl_penalty_forward`.
"""

import numpy as np
import pytest
import torch

from megatron_klear.kernels.reference import kl_term
from megatron_klear.rl import losses as L
from megatron_klear.rl.advantages import Advantage, advantages_of
from megatron_klear.rl.batch_losses import Alone
from megatron_klear.rl.weights import sequence_mean, sequence_mean_token_sum, token_mean
from megatron_klear.types import PackedBatch

OLD = torch.tensor([-1.0, -0.5, -2.0, -0.3, -0.7, -1.5, -0.2], dtype=torch.float64)
NEW = torch.tensor([-0.6, -0.55, -2.9, -0.3, -1.3, -1.4, -0.1], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.2] * 4 + [-0.8] * 3, dtype=torch.float64)
COUNTS, BOUNDS = [4, 3], torch.tensor([0, 4, 7], dtype=torch.int32)
AVERAGES = {
    "token-mean": token_mean,
    "seq-mean-token-mean": sequence_mean,
    "seq-mean-token-sum": lambda counts: sequence_mean_token_sum(counts, length=1),
}
PPO_SLOPES = [0.0, -0.1630679013, -0.069697656, -0.1714285714, 0.0, 0.1263052478, 0.1263052478]
CASES = {
    "ppo": (L.PPO(0.2, 0.2, 3.0), "token-mean", -0.2658693475, PPO_SLOPES),
    "ppo, sums": (
        L.PPO(0.2, 0.2, 3.0),
        "seq-mean-token-sum",
        -0.9305427161,
        [0.0, -0.5707376547, -0.2439417958, -0.6, 0.0, 0.4420683672, 0.4420683672],
    ),
    "ppo, sequences": (
        L.PPO(0.2, 0.2, 3.0),
        "seq-mean-token-mean",
        -0.1322909512,
        [0.0, -0.1426844133, -0.0609854488, -0.1499999996, 0.0, 0.1473561219, 0.1473561219],
    ),
    "clip-higher": (L.PPO(0.2, 0.28, 3.0), "token-mean", -0.2795836332, PPO_SLOPES),
    "cispo": (
        L.CISPO(0.2, 0.28),
        "token-mean",
        0.3621723312,
        [-0.2194285714, -0.1630679013, -0.1371428571, -0.1714285714, 0.0914285714, 0.1263052478, 0.1263052478],
    ),
    "sapo": (
        L.SAPO(1.0, 1.05),
        "seq-mean-token-mean",
        -0.4476525923,
        [-0.2107688955, -0.1425996008, -0.0559163987, -0.1499999996, 0.0692179348, 0.1469077937, 0.1469077937],
    ),
    # verl's value is that of a weighted score; the slopes are the loss's.
    "dppo, tv": (L.DPPO("tv", 0.15, 0.15), "token-mean", None, PPO_SLOPES),
    "dppo, kl": (L.DPPO("kl", 0.05, 0.05), "token-mean", None, PPO_SLOPES),
    "gspo": (L.GSPO(0.1, 0.1), "seq-mean-token-mean", -0.1629206099, [-0.1307301522] * 4 + [0.0] * 3),
    # A token past the clip counts 0 in our value: the slopes are the loss's.
    "gmpo": (
        L.GMPO(clip_low=0.4, clip_high=0.3),
        "seq-mean-token-mean",
        None,
        [0.0, -0.1275024129, -0.1275024129, -0.1275024129, 0.0, 0.1247342639, 0.1247342639],
    ),
    "clip-cov": (
        L.ClipCov(0.2, 0.2, share=0.6, cov_low=-0.2),
        "token-mean",
        None,
        [0.0, 0.0, -0.069697656, 0.0, 0.0, 0.0, 0.1263052478],
    ),
    "kl-cov": (
        L.KLCov(share=0.3, kl_coefficient=0.5),
        "token-mean",
        None,
        [-0.2557413767, -0.1630679013, -0.069697656, -0.1714285714, 0.0627213298, 0.1977338192, 0.1263052478],
    ),
}


def row() -> PackedBatch:
    return PackedBatch(
        tokens=torch.zeros(7, dtype=torch.int64),
        targets=torch.zeros(7, dtype=torch.int64),
        weights=torch.ones(7),
        cu_seqlens=BOUNDS,
        advantages=ADVANTAGES,
        old_logprobs=OLD,
        sample_numbers=(0, 1),
    )


@pytest.mark.parametrize("name", list(CASES))
def test_loss_and_gradient(name: str):
    loss, average, value, slopes = CASES[name]
    weights = torch.from_numpy(np.repeat(AVERAGES[average](COUNTS), COUNTS))
    logprobs = NEW.clone().requires_grad_()
    if isinstance(loss, L.BatchLoss):
        (batch,) = loss.rewrite([row()], [NEW], Alone(), salt=1)
        per_token = loss.token_loss()(logprobs, batch.old_logprobs, batch.advantages)
    elif isinstance(loss, L.SequenceLoss):
        per_token = loss(logprobs, OLD, ADVANTAGES, torch.ones(7, dtype=torch.bool), BOUNDS)
    else:
        per_token = loss(logprobs, OLD, ADVANTAGES)
    total = (weights * per_token).sum()
    (found,) = torch.autograd.grad(total, logprobs)
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    if value is not None:
        assert float(total.detach()) == pytest.approx(value, rel=1e-6)


REWARDS = [np.array([1.0, 0.0, 0.5]), np.array([2.0, -1.0, 0.0])]
LENGTHS = [np.array([3, 2, 1]), np.array([3, 3, 2])]
ESTIMATES: dict[Advantage, list[float]] = {
    "mean_std": [0.999998, -0.999998, 0.0, 1.0910887369, -0.8728709895, -0.2182177474],
    "mean": [0.5, -0.5, 0.0, 1.6666666667, -1.3333333333, -0.3333333333],
    "rloo": [0.75, -0.75, 0.0, 2.5, -2.0, -0.5],
    "opo": [0.4166666667, -0.5833333333, -0.0833333333, 1.625, -1.375, -0.375],
    "reinforce_plus_plus": [0.494907916, -0.4289201933, 0.0329938614, 1.4187360253, -1.3527483026, -0.4289201933],
    "reinforce_plus_plus_baseline": [
        0.4088460173, -0.5193449408, -0.0552494618, 1.4917354684, -1.2928374059, -0.3646464478,
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ESTIMATES))
def test_estimators(kind: Advantage):
    found = np.concatenate(advantages_of(REWARDS, LENGTHS, kind))
    np.testing.assert_allclose(found, ESTIMATES[kind], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "values"),
    [("k2", [0.08, 0.00125, 0.405, 0.0]), ("k3", [0.070320046, 0.0012710964, 0.5596031112, 0.0])],
)
def test_kl_forms(kind, values):
    found = kl_term(NEW[:4], OLD[:4], torch.ones(4, dtype=torch.float64), kind)
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-9)
