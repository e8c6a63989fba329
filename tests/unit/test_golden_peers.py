"""The figures that the test suites of other systems expect of the same losses, corrections, averages and estimators.

Numbers, not code, from the files named beside them:
    NeMo-RL   github.com/NVIDIA-NeMo/RL at 7ea279ab, tests/unit/algorithms/test_loss_functions.py
    SkyRL     github.com/NovaSky-AI/SkyRL at a9564572, tests/train/algorithms/test_losses.py and
              test_off_policy_correction.py, tests/backends/skyrl_train/utils/test_ppo_utils.py
    slime     github.com/THUDM/slime at 624b824a, tests/test_policy_loss.py and test_cispo_loss.py
    prime-rl  github.com/PrimeIntellect-ai/prime-rl at 559b4477, tests/unit/train/rl/test_loss.py and
              tests/unit/orchestrator/test_advantage.py
verl's are in test_golden_verl.py; NeMo-RL's of the KL forms in tests/kernels/test_kl.py, SkyRL's of SAPO and DPPO in
test_losses.py.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_klear.rl import losses as L
from megatron_klear.rl.advantages import advantages_of
from megatron_klear.rl.corrections import importance_weights
from megatron_klear.rl.weights import sequence_mean, token_mean


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    """To the digits that the suites print."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, check_dtype=False)


ADVANTAGES, OLD, PRESENT = row(1.0, -1.0, 2.0), row(-1.0, -1.0, -1.0), row(-1.69315, -1.0, -0.59453)
DRAWN = row(-0.5, -1.5, -0.8)
DUAL = row(1.0, -1.0, -4.0), row(-1.0, -1.0, -3.0), row(-1.69315, -1.0, -0.69741)
ONE = torch.tensor([0, 3], dtype=torch.int32)
ALL = torch.ones(3, dtype=torch.bool)


def gspo(advantages: Tensor, old: Tensor, present: Tensor, bounds: Tensor) -> Tensor:
    return L.GSPO(0.2, 0.2)(present, old, advantages, torch.ones(len(old), dtype=torch.bool), bounds)


def test_losses_of_nemo_rl():
    ppo = L.PPO(0.2, 0.2)(PRESENT, OLD, ADVANTAGES)
    close(ppo, row(-0.5, 1.0, -2.4))
    assert float(ppo.mean()) == pytest.approx(-0.6333, rel=1e-3)
    reinforce = L.REINFORCE()(row(-0.5, -1.0, -1.5), None, ADVANTAGES)
    assert float(reinforce.mean()) == pytest.approx(0.8333, rel=1e-3)
    dual = L.PPO(0.2, 0.2, dual_clip=3.0)(DUAL[2], DUAL[1], DUAL[0])
    close(dual, row(-0.5, 1.0, 12.0))
    assert float(dual.mean()) == pytest.approx(4.1667, rel=1e-3)


def test_gspo_of_nemo_rl():
    alone = gspo(ADVANTAGES, OLD, PRESENT, ONE)
    close(alone, row(-0.9086, 0.9086, -1.8171))
    assert float(alone.mean()) == pytest.approx(-0.6057, rel=1e-3)
    # The second sequence's ratio is clipped to 1.2 where the advantage is positive.
    both = gspo(
        torch.cat([ADVANTAGES, ADVANTAGES]),
        torch.cat([OLD, OLD - 1]),
        torch.cat([PRESENT, PRESENT]),
        torch.tensor([0, 3, 6], dtype=torch.int32),
    )
    assert float(both.mean()) == pytest.approx(-0.4912, rel=1e-3)


def test_corrections_of_nemo_rl():
    """Their weights multiply the clipped loss, as ours the advantages of a loss that is linear in them."""
    plain = importance_weights(OLD, DRAWN, "truncated", 1e9)
    close(plain, row(0.6065, 1.6487, 0.8187))
    corrected = L.PPO(0.2, 0.2)(PRESENT, OLD, ADVANTAGES * plain)
    close(corrected, row(-0.30325, 1.6487, -1.96488))
    assert float(corrected.mean()) == pytest.approx(-0.2065, rel=2e-3)
    capped = importance_weights(OLD, DRAWN, "truncated", 0.8)
    corrected = L.PPO(0.2, 0.2)(PRESENT, OLD, ADVANTAGES * capped)
    close(corrected, row(-0.3033, 0.8, -1.92))
    assert float(corrected.mean()) == pytest.approx(-0.4744, rel=1e-3)
    whole = importance_weights(OLD, DRAWN, "truncated", 1e9, level="sequence", trained=ALL, cu_seqlens=ONE)
    close(whole, row(0.8187, 0.8187, 0.8187))
    corrected = gspo(ADVANTAGES * whole, OLD, PRESENT, ONE)
    close(corrected, row(-0.7439, 0.7439, -1.4877))
    assert float(corrected.mean()) == pytest.approx(-0.4959, rel=1e-3)
    capped = importance_weights(OLD, DRAWN, "truncated", 0.8, level="sequence", trained=ALL, cu_seqlens=ONE)
    corrected = gspo(ADVANTAGES * capped, OLD, PRESENT, ONE)
    close(corrected, row(-0.7268, 0.7268, -1.4537))
    assert float(corrected.mean()) == pytest.approx(-0.4846, rel=1e-3)


def test_icepop_and_sequence_masks_of_nemo_rl():
    kept = importance_weights(OLD, row(-0.5, -3.5, -0.8), "masked", 5.0, floor=0.5)
    close(kept, row(0.6065, 0.0, 0.8187))
    ratios = row(0.1, 1.0, 3.0).log()
    close(importance_weights(ratios, torch.zeros_like(ratios), "truncated", 2.0), row(0.1, 1.0, 2.0))
    for drawn, expected in ((-1.0005, 1.0005), (-1.01, 0.0)):
        masked = importance_weights(
            OLD,
            row(drawn, drawn, drawn),
            "truncated",
            10.0,
            sequence_bounds=(0.999, 1.002),
            trained=ALL,
            cu_seqlens=ONE,
        )
        close(masked, row(expected, expected, expected))


def test_losses_of_skyrl():
    dual = L.PPO(0.2, 0.2, dual_clip=3.0)(DUAL[2], DUAL[1], DUAL[0])
    assert float(dual.sum()) == pytest.approx(12.5, abs=1e-3)
    cispo = L.CISPO(0.2, 0.2)(DUAL[2], DUAL[1], DUAL[0])
    assert float(cispo.sum()) == pytest.approx(-2.9930, abs=1e-4)


def test_corrections_of_skyrl():
    old, drawn = row(-1.0, -1.5, -0.5), row(-1.5, -1.0, -1.5)
    by_token = importance_weights(old, drawn, "truncated", 2.0)
    close(by_token, row(1.6487, 0.6065, 2.0))

    def of_sequence(old: Tensor, drawn: Tensor, cap: float, trained: Tensor = ALL) -> float:
        found = importance_weights(old, drawn, "truncated", cap, level="sequence", trained=trained, cu_seqlens=ONE)
        return float(found[0])

    assert of_sequence(old, drawn, 5.0) == pytest.approx(2.7183, rel=1e-3)
    assert of_sequence(row(-1.0, -1.0, -1.0), row(-2.0, -2.0, -2.0), 5.0) == pytest.approx(5.0)
    assert of_sequence(old, drawn, 10.0, torch.tensor([True, False, True])) == pytest.approx(4.4817, rel=1e-3)

    def kept(old: Tensor, drawn: Tensor, bounds: tuple[float, float]) -> bool:
        found = importance_weights(old, drawn, "truncated", 100.0, sequence_bounds=bounds, trained=ALL, cu_seqlens=ONE)
        return bool(found.all())

    assert kept(row(-1.0, -1.1, -1.0), row(-1.1, -1.0, -1.0), (0.9, 1.1))
    assert not kept(row(-1.0, -1.0, -1.0), row(-1.5, -1.5, -1.5), (0.9, 1.1))
    by_product = {"level": "sequence", "trained": ALL, "cu_seqlens": ONE, "floor": 0.5}
    assert importance_weights(row(-1.0, -1.1, -1.2), row(-1.2, -1.2, -1.2), "masked", 2.0, **by_product).all()
    assert not importance_weights(row(-1.0, -1.0, -1.0), row(-2.0, -2.0, -2.0), "masked", 2.0, **by_product).any()


def test_estimators_of_skyrl():
    rewards = [np.array([6.0, 3.0]), np.array([9.0, 12.0])]
    lengths = [np.array([3, 3]), np.array([3, 3])]
    np.testing.assert_allclose(np.concatenate(advantages_of(rewards, lengths, "rloo")), [3.0, -3.0, -3.0, 3.0])
    np.testing.assert_allclose(np.concatenate(advantages_of(rewards, lengths, "mean")), [1.5, -1.5, -1.5, 1.5])


def test_averages_of_skyrl_and_prime_rl():
    losses, counts = np.array([1.0, 2.0, 3.0, 4.0]), [3, 1]
    weights = np.repeat(token_mean(counts), counts)
    assert (weights * losses).sum() * sum(counts) == pytest.approx(10.0)
    assert (np.repeat(sequence_mean(counts), counts) * losses).sum() == pytest.approx((2.0 + 4.0) / 2)
    nll = L.NLL()(row(-0.1, -0.2))
    assert float((nll * torch.from_numpy(np.repeat(token_mean([2]), 2))).sum()) == pytest.approx(0.15)


def test_losses_of_slime():
    ratios, advantages = row(2.0, 2.0, 0.5), row(2.0, -2.0, 2.0)
    found = L.PPO(0.2, 0.2, dual_clip=1.5)(ratios.log(), torch.zeros_like(ratios), advantages)
    close(found, row(-2.4, 3.0, -1.0))


@pytest.mark.parametrize(
    ("low", "high", "ratios", "clamped"),
    [
        (0.2, 0.28, [1.0, 1.14, 1.56, 0.4], [1.0, 1.14, 1.28, 0.8]),
        (1.0, 4.0, [1.0, 3.0, 9.0, 0.4], [1.0, 3.0, 5.0, 0.4]),
    ],
)
def test_cispo_of_slime(low, high, ratios, clamped):
    advantages, logprobs = row(1.0, -0.5, 2.0, -1.0), row(-0.7, -1.2, -0.4, -2.1).requires_grad_()
    found = L.CISPO(low, high)(logprobs, logprobs.detach() - row(*ratios).log(), advantages)
    close(found.detach(), -row(*clamped) * advantages * logprobs.detach())
    (slope,) = torch.autograd.grad(found.sum(), logprobs)
    close(slope, -row(*clamped) * advantages)


def test_a_group_s_advantages_sum_to_zero_as_prime_rl_has_it():
    found = advantages_of([np.array([1.0, 0.5, 0.8])], [np.array([10, 12, 8])], "mean")[0]
    assert found.sum() == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(found, [1.0 - 2.3 / 3, 0.5 - 2.3 / 3, 0.8 - 2.3 / 3])
