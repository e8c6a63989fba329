"""Problems and comparisons shared by the tests of the fused policy loss."""

import torch

from megatron_klear.kernels import PolicyLossInputs
from megatron_klear.rl.losses import CISPO, DPPO, GPPO, NLL, PPO, REINFORCE, SAPO, CappedCISPO


class Sigmoid:
    """A loss of one's own: not of the family, but local to a token."""

    def __call__(self, logprobs, old_logprobs, advantages):
        return -advantages * torch.sigmoid(4 * (logprobs - old_logprobs))

    def coefficients(self):
        return None


class SquaredMean:
    """A loss of one's own that mixes the tokens of a row."""

    def __call__(self, logprobs, old_logprobs, advantages):
        return (logprobs - logprobs.mean()) ** 2

    def coefficients(self):
        return None


FAMILY = {
    "gppo": GPPO(),
    "gppo_beta_dual": GPPO(beta_low=0.5, beta_high=0.75, dual_clip=2.0),
    "ppo": PPO(0.2, 0.28),
    "cispo": CISPO(0.2, 0.28),
    "capped_cispo": CappedCISPO(1.5),
    "reinforce": REINFORCE(),
    "nll": NLL(),
    "sapo": SAPO(),
    "dppo_tv": DPPO(bound_low=0.01, bound_high=0.02),
    "dppo_kl": DPPO("kl", 0.002, 0.001, ratio_cap=2.0),
}
OWN = {"sigmoid": Sigmoid(), "squared_mean": SquaredMean()}
PER_TOKEN = ("logprobs", "entropy", "lse", "ratio", "region")


def problem(tokens=96, hidden=24, vocab=500, dtype=torch.float32, valid=None, seed=0, weighted=0.7):
    """A row of `tokens`, some of weight zero, some of advantage zero; `valid` columns of the head are not padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform():
        return torch.rand(tokens, generator=generator)

    states, head = normal(tokens, hidden).to(dtype), (0.4 * normal(vocab, hidden)).to(dtype)
    targets = torch.randint(valid or vocab, (tokens,), generator=generator)
    logits = (states.double() @ head.double().t())[:, :valid]
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].float()
    return {
        "hidden": states,
        "weight": head,
        "targets": targets,
        "old_logprobs": logprobs + 0.5 * normal(tokens),
        "advantages": normal(tokens) * (uniform() > 0.2),
        "policy_weights": uniform() * (uniform() < weighted) / max(tokens, 1),
        "nll_weights": uniform() * (uniform() > 0.8) / max(tokens, 1),
        "ref_logprobs": logprobs + 0.3 * normal(tokens),
        "vocab_size": valid,
    }


def double(arguments):
    """The same problem in float64."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    return wide | {"logits_dtype": torch.float64}


def differentiate(function, arguments, scale=1.0, **more):
    """The output of `function` and the gradients of hidden states and head."""
    arguments = arguments | more
    for name in ("hidden", "weight"):
        arguments[name] = arguments[name].detach().clone().requires_grad_()
    output = function(PolicyLossInputs(**arguments))
    (output.loss * scale).backward()
    return output, arguments["hidden"].grad, arguments["weight"].grad


def relative(got, expected):
    """Norm of the difference over the norm of what is expected."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def errors(got, expected):
    """Relative errors of loss, per-token results and the two gradients, by name; regions count their mismatches."""
    outputs, expected_outputs = got[0], expected[0]
    found = {name: relative(getattr(outputs, name), getattr(expected_outputs, name)) for name in PER_TOKEN}
    found["loss"] = relative(outputs.loss, expected_outputs.loss)
    found["hidden"], found["weight"] = (relative(a, b) for a, b in zip(got[1:], expected[1:], strict=True))
    return found


def same_bits(got, expected):
    """Whether two results are equal to the bit."""
    pairs = [(getattr(got[0], name), getattr(expected[0], name)) for name in ("loss", *PER_TOKEN)]
    return all(torch.equal(a, b) for a, b in [*pairs, *zip(got[1:], expected[1:], strict=True)])
