"""The KL estimators against the constants of other projects' tests, value and gradient."""

import pytest
import torch

from megatron_klear.kernels.reference import kl_term


def value_and_slope(logprobs, reference, estimator, ratio=None):
    leaf = torch.tensor(logprobs).requires_grad_()
    value = kl_term(leaf, torch.tensor(reference), torch.ones(len(logprobs)) if ratio is None else ratio, estimator)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


@pytest.mark.parametrize(("estimator", "first"), [("k2", 0.5), ("k3", 0.7183), ("k3_unbiased", 0.7183)])
def test_values_are_those_of_nemo_rl(estimator, first):
    """NeMo-RL, test_calculate_kl: the clamped values; nothing past the clamp has a gradient."""
    value, slope = value_and_slope([-1.0, -1.0, -1.0], [0.0, -15.0, -30.0], estimator)
    torch.testing.assert_close(value, torch.tensor([first, 10.0, 10.0]), rtol=1e-3, atol=0)
    assert slope[1:].tolist() == [0, 0]


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_has_the_sampling_term(weighted):
    """NeMo-RL, test_clipped_pg_loss_kl_gradient_includes_sampling_term: w (k3 + 1 - exp(d))."""
    present, sampled, reference = [-1.2, -0.7], [-1.5, -0.4], [-0.9, -1.1]
    ratio = (torch.tensor(present) - torch.tensor(sampled)).exp()
    _, slope = value_and_slope(present, reference, "k3_weighted" if weighted else "k3_unbiased", ratio)
    d = torch.tensor(reference) - torch.tensor(present)
    expected = (ratio if weighted else 1) * ((d.exp() - 1 - d) + (1 - d.exp()))
    torch.testing.assert_close(slope, expected)


def test_only_k3_has_a_biased_gradient():
    """Over all tokens of a distribution, the mean slope times the score against the exact gradient of the KL."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.2, -0.4, 0.3], dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    for estimator in ("k3", "k2", "k3_unbiased", "k3_weighted"):
        value = kl_term(logprobs, reference, torch.ones_like(reference), estimator)
        (mean,) = torch.autograd.grad((logprobs.exp().detach() * value).sum(), logits, retain_graph=True)
        assert torch.allclose(mean, exact) == (estimator != "k3"), estimator
