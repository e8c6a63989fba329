"""Every loss against its published formula, value and gradient, in every region of the clip."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from megatron_klear.rl import losses as L
from megatron_klear.types import LossKind

LOW, HIGH, DUAL = 0.8, 1.28, 3.0
DOUBLE = torch.float64


def published(name, logprobs, old, advantages, constant):
    """The formulas as printed, `constant` standing for sg(logprobs): an independent variable, so that a numerical
    derivative in `logprobs` is the published gradient.
    """
    ratio, frozen = (logprobs - old).exp(), (constant - old).exp()
    if name == "nll":
        return -logprobs
    if name == "reinforce":
        return -advantages * logprobs
    if name == "cispo":
        return -frozen.clamp(LOW, HIGH) * advantages * logprobs
    if name == "capped_cispo":
        return -frozen.clamp(max=2.0) * advantages * logprobs
    if name.startswith("ppo"):
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(LOW, HIGH))
    else:
        low, high = LOW / frozen * ratio, HIGH / frozen * ratio
        loss = torch.maximum(-advantages * ratio, -advantages * torch.minimum(torch.maximum(ratio, low), high))
    if name == "gppo_beta":
        loss = torch.where((advantages > 0) & (frozen > HIGH), 0.5 * loss, loss)
        loss = torch.where((advantages < 0) & (frozen < LOW), 0.25 * loss, loss)
    if name.endswith("_dual"):
        loss = torch.where(advantages < 0, torch.minimum(-advantages * DUAL, loss), loss)
    return loss


FAMILY = {
    "gppo": L.GPPO(),
    "gppo_dual": L.GPPO(dual_clip=DUAL),
    "gppo_beta": L.GPPO(beta_low=0.25, beta_high=0.5),
    "ppo": L.PPO(0.2, 0.28),
    "ppo_dual": L.PPO(0.2, 0.28, dual_clip=DUAL),
    "cispo": L.CISPO(0.2, 0.28),
    "capped_cispo": L.CappedCISPO(cap=2.0),
    "reinforce": L.REINFORCE(),
    "nll": L.NLL(),
}


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -5 * torch.rand(count, generator=generator, dtype=DOUBLE)
    old = logprobs + 0.8 * torch.randn(count, generator=generator, dtype=DOUBLE)
    return logprobs, old, torch.randn(count, generator=generator, dtype=DOUBLE)


def value_and_slope(loss, logprobs, old, advantages):
    logprobs = logprobs.clone().requires_grad_()
    values = loss(logprobs, old, advantages)
    (slope,) = torch.autograd.grad(values.sum(), logprobs)
    return values.detach(), slope


@pytest.mark.parametrize("name", FAMILY)
def test_value_and_gradient_are_the_published_ones_on_100k_tokens(name):
    logprobs, old, advantages = tokens(100_000)
    values, slope = value_and_slope(FAMILY[name], logprobs, old, advantages)
    expected, expected_slope = value_and_slope(
        lambda lp, o, a: published(name, lp, o, a, logprobs), logprobs, old, advantages
    )
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-12, atol=1e-12)
    coefficients = FAMILY[name].coefficients()
    seen = L.regions(L.importance_ratio(logprobs, old), advantages, coefficients).unique()
    expected_regions = {LossKind.NLL: 1, LossKind.REINFORCE: 1, LossKind.CISPO: 3 if name == "capped_cispo" else 5}
    with_dual = 6 if math.isfinite(coefficients.dual_clip) else 5
    assert len(seen) == expected_regions.get(coefficients.kind, with_dual), "the tokens must visit every region"


@pytest.mark.parametrize("name", FAMILY)
def test_slope_is_the_numerical_derivative(name):
    logprobs, old, advantages = tokens(60, seed=1)
    constant = logprobs.clone()
    assert torch.autograd.gradcheck(
        lambda lp: published(name, lp, old, advantages, constant), logprobs.requires_grad_()
    )
    _, slope = value_and_slope(FAMILY[name], logprobs.detach(), old, advantages)
    step = 1e-6
    numerical = (
        published(name, constant + step, old, advantages, constant)
        - published(name, constant - step, old, advantages, constant)
    ) / (2 * step)
    torch.testing.assert_close(slope, numerical, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", [L.REINFORCE(), L.NLL(), L.PPO(0.2, 0.28, 3.0), L.GPPO(1.0, 1e9)], ids=repr)
def test_gradcheck_of_losses_without_a_stop_gradient(loss):
    logprobs, old, advantages = tokens(60, seed=2)
    assert torch.autograd.gradcheck(lambda lp: loss(lp, old, advantages), logprobs.requires_grad_())


@pytest.mark.parametrize("loss", [L.GPPO(), L.GPPO(0.1, 0.4, 0.3, 0.7)], ids=repr)
def test_gppo_without_dual_clip_equals_its_own_gradient(loss):
    values, slope = value_and_slope(loss, *tokens(100_000))
    assert torch.equal(values, slope)


TABLE = [  # ratio, gradient weight F in d loss / d logp = -F A: PPO, GPPO, CISPO, REINFORCE; for A = +1, then A = -1
    (0.3, (0.3, 0.3, 0.8, 1), (0, 0.8, 0.8, 1)),
    (0.79, (0.79, 0.79, 0.8, 1), (0, 0.8, 0.8, 1)),
    (0.81, (0.81, 0.81, 0.81, 1), (0.81, 0.81, 0.81, 1)),
    (1.0, (1, 1, 1, 1), (1, 1, 1, 1)),
    (1.27, (1.27, 1.27, 1.27, 1), (1.27, 1.27, 1.27, 1)),
    (1.29, (0, 1.28, 1.28, 1), (1.29, 1.29, 1.28, 1)),
    (9.9, (0, 1.28, 1.28, 1), (9.9, 9.9, 1.28, 1)),
    (10.1, (0, 1.28, 1.28, 1), (0, 0, 1.28, 1)),
]


@pytest.mark.parametrize(("ratio", "positive", "negative"), TABLE)
def test_gradient_weights_equal_the_published_table(ratio, positive, negative):
    family = (L.PPO(0.2, 0.28, 10.0), L.GPPO(dual_clip=10.0), L.CISPO(0.2, 0.28), L.REINFORCE())
    old = torch.tensor([-1.0], dtype=DOUBLE)
    for advantage, weights in ((1.0, positive), (-1.0, negative)):
        for loss, weight in zip(family, weights, strict=True):
            _, slope = value_and_slope(loss, old + math.log(ratio), old, torch.tensor([advantage], dtype=DOUBLE))
            assert slope.item() == pytest.approx(-advantage * weight, rel=1e-9, abs=1e-12), loss


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(loss, dtype):
    edges = torch.tensor([-1e4, -119.0, -90.0, -20.0, 0.0, 20.0, 94.5, 1e4], dtype=dtype)
    log_ratio, advantages = torch.cartesian_prod(edges, torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)).unbind(-1)
    values, slope = value_and_slope(loss, -log_ratio.abs() + log_ratio, -log_ratio.abs(), advantages)
    assert torch.isfinite(values).all()
    assert torch.isfinite(slope).all()
    if not isinstance(loss, L.NLL):
        assert (values[advantages == 0] == 0).all()
        assert (slope[advantages == 0] == 0).all()


@pytest.mark.parametrize("loss", [loss for name, loss in FAMILY.items() if name not in ("nll", "reinforce")], ids=repr)
def test_minus_infinity_is_the_clamped_ratio_not_nan(loss):
    minus_infinity, old = torch.tensor([-math.inf, -math.inf]), torch.tensor([-1.0, -1.0])
    _, slope = value_and_slope(loss, minus_infinity, old, torch.tensor([1.0, -1.0]))
    _, clamped = value_and_slope(loss, old - 20, old, torch.tensor([1.0, -1.0]))
    assert torch.equal(slope, clamped)


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_empty_batch(loss):
    values, slope = value_and_slope(loss, *(torch.zeros(0) for _ in range(3)))
    assert values.shape == slope.shape == (0,)


def test_regions_number_the_corners_of_the_clip():
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 11.0, 1.0, 11.0])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    found = L.regions(ratio, advantages, L.GPPO(dual_clip=10.0).coefficients())
    assert found.tolist() == [1, 2, 3, 4, 5, 0, 2]
    assert [L.Region(code).name for code in found[:3].tolist()] == ["NEGATIVE_LOW", "POSITIVE_HIGH", "POSITIVE_LOW"]


def test_gspo_gives_a_sequence_one_ratio_and_spreads_its_gradient():
    loss, lengths = L.GSPO(0.1, 0.1), (4, 3, 5)
    bounds = torch.tensor([0, 4, 7, 12], dtype=torch.int32)
    logprobs, old, _ = tokens(12, seed=3)
    old = logprobs + 0.05 * (old - logprobs)
    trained = torch.tensor([True] * 3 + [False] + [True] * 2 + [False] * 5 + [True])
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=DOUBLE).repeat_interleave(torch.tensor(lengths))
    weights = torch.where(trained, 1.0, 0.0) / torch.tensor([3.0, 2.0, 1.0]).repeat_interleave(torch.tensor(lengths))

    def paper(lp):
        terms = []
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            s = (lp[a:b] - old[a:b])[trained[a:b]].mean().exp()
            terms.append(-torch.minimum(s * advantages[a], s.clamp(0.9, 1.1) * advantages[a]))
        return torch.stack(terms).sum()

    logprobs = logprobs.requires_grad_()
    whole = (weights * loss(logprobs, old, advantages, trained, bounds)).sum()
    torch.testing.assert_close(whole, paper(logprobs))
    (got,), (expected,) = torch.autograd.grad(whole, logprobs), torch.autograd.grad(paper(logprobs), logprobs)
    torch.testing.assert_close(got, expected)
    shifted = loss.sequence_old_logprobs(logprobs, old, trained, bounds)
    torch.testing.assert_close(loss.token_loss()(logprobs, shifted, advantages)[~trained], -advantages[~trained])


def my_loss(logprobs, old_logprobs, advantages):
    return -advantages * torch.sigmoid(logprobs)


class MyLoss:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, logprobs, old_logprobs, advantages):
        return -self.scale * logprobs

    def coefficients(self):
        return None


def test_losses_resolve_by_name_and_by_dotted_path():
    assert L.resolve_loss("gppo", {"clip_low": 0.1}) == L.GPPO(clip_low=0.1)
    assert isinstance(L.resolve_loss("gspo"), L.GSPO)
    mine = L.resolve_loss(f"{__name__}:MyLoss", {"scale": 2.0})
    assert isinstance(mine, MyLoss)
    assert mine.scale == 2.0
    function = L.resolve_loss(f"{__name__}:my_loss")
    assert function.coefficients() is None
    assert function(torch.zeros(2), None, torch.ones(2)).tolist() == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpo", {}, "unknown loss 'gpo'"),
        ("gppo", {"cliplow": 1}, "cliplow"),
        ("no.such.module:Loss", {}, "cannot be imported"),
        ("math:nothing", {}, "cannot be imported"),
        ("math:pi", {}, "not callable"),
        ("math:exp", {"a": 1}, "takes no arguments"),
    ],
)
def test_unresolvable_losses_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        L.resolve_loss(name, arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.GPPO(clip_low=1.5),
        lambda: L.GPPO(clip_high=-0.1),
        lambda: L.GPPO(beta_low=-1),
        lambda: L.GPPO(clip_high=math.nan),
        lambda: L.PPO(0.2, 0.2, dual_clip=0.5),
        lambda: L.CISPO(2.0, 0.2),
        lambda: L.CappedCISPO(cap=0),
        lambda: L.GSPO(clip_low=-1),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must"):
        make()


@pytest.mark.parametrize("loss", [L.GPPO(), L.PPO(0.2, 0.2), L.CISPO(0.2, 0.28), L.CappedCISPO()], ids=repr)
def test_missing_tensors_are_named(loss):
    with pytest.raises(ValueError, match="advantages"):
        loss(torch.zeros(1), torch.zeros(1), None)
    with pytest.raises(ValueError, match="old_logprobs"):
        loss(torch.zeros(1), None, torch.zeros(1))


def test_losses_are_configuration_tables():
    table = TypeAdapter(dict[str, L.GPPO | L.PPO | L.CISPO | L.NLL])
    assert table.validate_python({"loss": {"kind": "ppo", "clip_high": 0.3}})["loss"] == L.PPO(0.2, 0.3)
    one = TypeAdapter(L.GPPO)
    with pytest.raises(ValidationError, match="cliplow"):
        one.validate_python({"kind": "gppo", "cliplow": 0.1})


def test_sapo_and_dppo_give_the_constants_of_other_projects():
    """Inputs of SkyRL's tests of the same losses, and what those expect."""
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=DOUBLE)
    present = torch.tensor([-1.5, -0.8, -1.1], dtype=DOUBLE)
    values, _ = value_and_slope(L.SAPO(1.0, 2.0), present, old, torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE))
    gate = [4 / (1 + math.exp(-t * (math.exp(x) - 1))) / t for x, t in ((-0.5, 1), (0.2, 2), (-0.1, 1))]
    assert values.tolist() == pytest.approx([-gate[0], gate[1], -0.5 * gate[2]])
    moved = torch.tensor([-0.3, -2.0, -0.9], dtype=DOUBLE)
    values, slope = value_and_slope(L.DPPO(), moved, old, torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE))
    assert values.tolist() == pytest.approx([0, 0, -math.exp(0.1)])
    assert torch.equal(values, slope)
    against = torch.tensor([-2.0, -0.3], dtype=DOUBLE)  # far, but on the way back
    values, _ = value_and_slope(L.DPPO(), against, old[:2], torch.tensor([1.0, -1.0], dtype=DOUBLE))
    assert values.tolist() == pytest.approx([-math.exp(-1), math.exp(0.7)])


def test_dppo_by_kl_masks_by_the_binary_divergence():
    old, present = torch.tensor([math.log(0.5)], dtype=DOUBLE), torch.tensor([math.log(0.7)], dtype=DOUBLE)
    divergence = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    for bound, kept in ((divergence * 1.001, 1.4), (divergence * 0.999, 0.0)):
        loss = L.DPPO("kl", bound, bound)
        assert -loss(present, old, torch.ones(1, dtype=DOUBLE)).item() == pytest.approx(kept)
        assert loss(present, old, -torch.ones(1, dtype=DOUBLE)).item() == pytest.approx(1.4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.SAPO(tau_pos=0),
        lambda: L.SAPO(tau_neg=math.inf),
        lambda: L.DPPO("js"),
        lambda: L.DPPO(bound_low=-0.1),
        lambda: L.DPPO(ratio_cap=0.5),
    ],
)
def test_settings_of_soft_losses_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must"):
        make()
