"""What the benchmark of the fused policy loss compares: ours, torch's own ways, and other projects' where importable.

Adapters of other projects follow the interfaces of Liger-Kernel 0.8, quack-kernels 0.6 and cut-cross-entropy 25.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_klear.kernels import PolicyLossInputs, Terms, Tokens, fused_policy_loss, gemm
from megatron_klear.kernels.rows import policy_loss_rows
from megatron_klear.rl.losses import GPPO, NLL, PPO
from megatron_klear.types import TokenLoss

LOSS = GPPO()


@dataclass
class Problem:
    """A row of trained tokens, a head, and what each size of chunk needs."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]
    kept_logits: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """Logits of standard deviation 3; targets drawn uniformly; ratios between about 0.4 and 2.5."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        states, head = normal(tokens, hidden).to(dtype), (normal(vocab, hidden) * 3 / hidden**0.5).to(dtype)
        targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
        logprobs = torch.empty(tokens, device=device)
        for start in range(0, tokens, 1024):
            logits = (states[start : start + 1024] @ head.t()).float()
            picked = logits.gather(1, targets[start : start + 1024, None])[:, 0]
            logprobs[start : start + 1024] = picked - logits.logsumexp(-1)
        old_logprobs, advantages = logprobs + 0.3 * normal(tokens), normal(tokens)
        return cls(states.requires_grad_(), head.requires_grad_(), targets, old_logprobs, advantages)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.hidden.shape[0])

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.hidden.device

    @property
    def flop(self) -> int:
        """Of three matrix products."""
        return 6 * self.hidden.numel() * self.vocab_size

    @property
    def weights(self) -> Tensor:
        """Those of a token mean."""
        return torch.full_like(self.advantages, 1 / self.num_tokens)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """All logits [T, V], computed once."""
        if dtype not in self.kept_logits:
            self.kept_logits.clear()
            with torch.no_grad():
                self.kept_logits[dtype] = (self.hidden @ self.weight.t()).to(dtype)
        return self.kept_logits[dtype]

    def three_products(self) -> Callable[[], object]:
        """The bare products of a fused loss, over the chunks it would use, without a row kernel between them."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        size = gemm.chunk_size(self.num_tokens, self.vocab_size, torch.float32, self.device)
        buffer = gemm.logits_buffer(size, self.vocab_size, weight.dtype, self.device)
        gradient, total = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)

        def run() -> object:
            for start in range(0, self.num_tokens, size):
                chunk = hidden[start : start + size]
                logits = buffer[: len(chunk)]
                gemm.logits_into(logits, chunk, weight)
                torch.mm(logits, weight, out=gradient[start : start + size])
                gemm.add_weight_gradient(total, logits, chunk)
            return gradient

        return run


@dataclass(frozen=True)
class Contender:
    """One way to the loss and its gradients. `run` returns the gradient of hidden states, or of logits."""

    name: str
    start: str  # "hidden" or "logits"
    loss: TokenLoss
    dtype: torch.dtype  # of the logits
    run: Callable[[], Tensor]
    gradient_bytes: int  # of the gradients that `run` allocates
    prepare: Callable[[], object] = lambda: None
    one_advantage: bool = False  # reads one advantage a sequence: all are 1 there


def contenders(problem: Problem) -> Iterator[Contender]:
    """Every contender that this machine's packages allow."""
    yield from _from_hidden(problem)
    yield from _peers_from_hidden(problem)
    dtypes = [torch.float32, torch.bfloat16]
    if problem.device.type == "cuda" and problem.num_tokens > 16384:
        dtypes.reverse()
    for dtype in dtypes:
        yield from _from_logits(problem, dtype)
        problem.kept_logits.clear()


def _from_hidden(problem: Problem) -> Iterator[Contender]:
    p, dtype = problem, problem.weight.dtype
    head_gradient = torch.zeros_like(p.weight, dtype=torch.float32)
    states, both = p.hidden.numel() * dtype.itemsize, (p.hidden.numel() + p.weight.numel()) * dtype.itemsize

    def ours(logits_dtype: torch.dtype, loss: TokenLoss) -> Callable[[], Tensor]:
        def run() -> Tensor:
            inputs = PolicyLossInputs(
                hidden=p.hidden,
                weight=p.weight,
                targets=p.targets,
                loss=loss,
                policy_weights=p.weights,
                old_logprobs=p.old_logprobs,
                advantages=p.advantages,
                main_grad=head_gradient,
                weight_grad="main_grad_tied",
                logits_dtype=logits_dtype,
            )
            return torch.autograd.grad(fused_policy_loss(inputs).loss, p.hidden)[0]

        return run

    yield Contender("ours", "hidden", LOSS, torch.float32, ours(torch.float32, LOSS), states)
    if dtype == torch.bfloat16:
        yield Contender("ours, bf16 logits", "hidden", LOSS, dtype, ours(dtype, LOSS), states)
    yield Contender("ours", "hidden", NLL(), torch.float32, ours(torch.float32, NLL()), states)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).float()
        logprobs = torch.log_softmax(logits, -1).gather(1, p.targets[:, None])[:, 0]
        return LOSS(logprobs, p.old_logprobs, p.advantages).mean()

    compiled = torch.compile(plain)
    for name, function in (("torch eager", plain), ("torch.compile", compiled)):
        yield Contender(name, "hidden", LOSS, dtype, _gradients(function, p), both)
    if hasattr(functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        function = lambda x, w: functional.linear_cross_entropy(x, w, p.targets, options=options)  # noqa: E731
        yield Contender("torch linear_cross_entropy", "hidden", NLL(), dtype, _gradients(function, p), both)


def _gradients(function: Callable[[Tensor, Tensor], Tensor], problem: Problem) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = function(problem.hidden, problem.weight)
        return torch.autograd.grad(loss, (problem.hidden, problem.weight))[0]

    return run


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _peers_from_hidden(problem: Problem) -> Iterator[Contender]:
    p, dtype = problem, problem.weight.dtype
    both = (p.hidden.numel() + p.weight.numel()) * dtype.itemsize

    def peer(name: str, loss: TokenLoss, function: Callable[[Tensor, Tensor], Tensor], one: bool = False) -> Contender:
        return Contender(name, "hidden", loss, dtype, _gradients(function, p), both, one_advantage=one)

    if p.device.type == "cuda" and _installed("liger_kernel"):
        yield peer("Liger fused linear CE", NLL(), _liger_linear(p))
        yield peer("Liger scaled CE + torch GPPO", LOSS, _liger_scaled(p))
        yield peer("Liger fused linear GRPO", PPO(0.2, 0.28), _liger_grpo(p), one=True)
    if p.device.type == "cuda" and _installed("quack"):
        yield peer("quack chunked linear CE", NLL(), _quack(p))
    if p.device.type == "cuda" and _installed("cut_cross_entropy"):
        yield peer("cut-cross-entropy", NLL(), _cce(p))


def _liger_linear(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, p.targets)

    return run


def _liger_scaled(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, p.targets)
        return LOSS(-nll.float(), p.old_logprobs, p.advantages).mean()

    return run


def _liger_grpo(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28)
        one, mask = torch.ones(1, device=p.device), torch.ones_like(p.targets)[None]
        result: Any = loss(hidden[None], weight, p.targets[None], mask, one, old_per_token_logps=p.old_logprobs[None])
        return result[0] if isinstance(result, tuple) else result

    return run


def _quack(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(hidden, weight, p.targets)

    return run


def _cce(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, p.targets)

    return run


def _from_logits(problem: Problem, dtype: torch.dtype) -> Iterator[Contender]:
    p = problem
    scratch = torch.empty_like(p.logits(dtype)).requires_grad_()
    size = scratch.numel() * dtype.itemsize
    given = {"old_logprobs": p.old_logprobs, "advantages": p.advantages}
    tokens, terms = (
        Tokens(targets=p.targets, policy_weights=p.weights, **given),
        Terms(coefficients=LOSS.coefficients()),
    )

    def restore() -> None:
        with torch.no_grad():
            scratch.copy_(p.logits(dtype))

    def ours() -> Tensor:
        logits = scratch.detach()
        policy_loss_rows(logits, tokens, terms)
        return logits

    def plain(logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits.float(), -1).gather(1, p.targets[:, None])[:, 0]
        return LOSS(logprobs, p.old_logprobs, p.advantages).mean()

    def of(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(function(scratch), scratch)[0]

    yield Contender("ours", "logits", LOSS, dtype, ours, 0, restore)
    yield Contender("torch eager", "logits", LOSS, dtype, of(plain), size, restore)
    yield Contender("torch.compile", "logits", LOSS, dtype, of(torch.compile(plain)), size, restore)
    if p.device.type == "cuda" and _installed("liger_kernel"):
        yield Contender(
            "Liger Triton GRPO", "logits", PPO(0.2, 0.28), dtype, of(_liger_triton(p)), 0, restore, one_advantage=True
        )
    if p.device.type == "cuda" and _installed("quack"):
        from quack.cross_entropy import cross_entropy

        function = lambda logits: cross_entropy(logits, p.targets, inplace_backward=True)  # noqa: E731
        yield Contender("quack CE", "logits", NLL(), dtype, of(function), 0, restore)


def _liger_triton(p: Problem) -> Callable[[Tensor], Tensor]:
    def run(logits: Tensor) -> Tensor:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        # it reads [B, L + 1, V] and leaves the last position out
        old, targets = p.old_logprobs[None, :-1], p.targets[None, :-1].contiguous()
        one = torch.ones(1, device=p.device)
        losses = triton_grpo_loss(logits[None], old.contiguous(), None, targets, one, None, 1.0, 0.0, 0.2, 0.28)
        return losses[0].sum() / p.num_tokens

    return run
