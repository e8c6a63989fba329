"""What is handed from one room to the next: prompt -> sample -> scored group -> packed batch -> step stats.

Ragged data (one sequence) is numpy, so that it pickles small. Packed data is torch, and every per-token tensor of a
batch has the one length T. The letters used in this package:
    T  tokens of one packed row, over all its sequences
    S  sequences packed in that row
    V  vocabulary
    H  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


Routes = npt.NDArray[np.unsignedinteger]
"""Numbers of experts [tokens, layers, chosen], uint8 or, of more than 256 experts, uint16."""


class VersionSpan(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a sample were drawn by the policy of version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One token sequence to train on: a prompt and what followed it.

    `trained` is true on the tokens the loss reads: the response, or in SFT the assistant's turns.
    `logprobs` are those of the policy that sampled the tokens, 0 where `trained` is false; None in SFT.
    `policy_version` is the oldest policy that drew a token; where several did, `version_spans` tells which drew what,
    in order and without a gap over the response, and is empty where one policy drew all.
    `routes` are the experts that each token went through when the token behind it was drawn, in the sampler's order;
    the last token was never read by the sampler and has none. None where the sampler was not asked for them.
    """

    tokens: npt.NDArray[np.int32]  # [n]
    trained: npt.NDArray[np.bool_]  # [n]
    logprobs: npt.NDArray[np.float32] | None = None  # [n]
    policy_version: int = 0
    version_spans: tuple[VersionSpan, ...] = ()
    finish: Literal["stop", "length", "none"] = "none"
    routes: Routes | None = None  # [n - 1, layers with experts, chosen]


def route_type(experts: int) -> type[np.unsignedinteger]:
    """What numbers of so many experts are kept as."""
    return np.uint8 if experts <= 256 else np.uint16


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One problem to roll out. `ground_truth` is whatever the reward of its `data_source` needs.

    `extra_info` is the row's own, for rewards that ask for it; `place` is the row as errors name it.
    """

    id: str
    data_source: str
    tokens: npt.NDArray[np.int32]  # [prompt], through the chat template, generation prompt included
    text: str
    ground_truth: Any
    extra_info: Any = None
    place: str = ""


class Verdict(StrEnum):
    """How the grading of a response ended."""

    RIGHT = "right"
    WRONG = "wrong"
    MALFORMED = "malformed"
    """No answer could be read, or the thinking format is broken."""
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How the program of a response fared on its tests."""

    status: str
    """`passed`, `failed`, `timeout`, `memory`, `crashed`, `contained`, `malformed` or `error`."""
    passed: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a reward said of one response."""

    reward: float
    verdict: Verdict
    note: str = ""
    """Why, in words for a person: the answer that was read, the error."""
    program: ProgramResult | None = None
    """Of a reward that runs programs."""
    vote: str = ""
    """The wrong answer that was read, where majorities count it and not the response's own text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The samples drawn from one prompt, their texts, and once graded their scores, one per sample.

    A sample's tokens are the prompt's followed by the response's; `trained` is true on the response, through the stop
    token that ended it, which its text is without.
    """

    prompt: Prompt
    samples: list[Sample]
    texts: list[str]
    scores: list[Score] | None = None

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """The samples' rewards [samples]. Raises ValueError before grading."""
        if self.scores is None:
            raise ValueError(f"group of prompt {self.prompt.id} is not graded yet")
        return np.array([score.reward for score in self.scores])


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch: S sequences laid end to end in one row of T tokens, without padding.

    Entry t of every tensor speaks of predicting `targets[t]` after reading `tokens[t]` and what precedes it in its own
    sequence. `weights` is 0 on prompts and on the last token of a sequence; over the global batch (all ranks and
    micro-batches) the weights sum to one, so that the loss of a step is the plain sum of weight * token loss.

    The row knows nothing of the layout it will run in: the engine pads segments for context and sequence parallelism,
    takes its slice, and hands results back in this very order.

    Example: sequences [5 6 7] and [8 9], trained everywhere but on their first token:
        tokens     5    6    7   8   9
        targets    6    7    0   9   0        (0 where there is nothing to predict)
        weights   1/3  1/3   0  1/3  0
        cu_seqlens 0 3 5
    """

    tokens: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    weights: Tensor  # [T] float32
    cu_seqlens: Tensor  # [S + 1] int32, on the CPU: the bounds drive Python loops and allocation sizes
    advantages: Tensor | None = None  # [T] float32
    old_logprobs: Tensor | None = None  # [T] float32, the policy at the start of the rollout step
    sampler_logprobs: Tensor | None = None  # [T] float32, the rollout engine's
    ref_logprobs: Tensor | None = None  # [T] float32, a frozen reference model's
    nll_weights: Tensor | None = None  # [T] float32, weights of an added -logp term
    routes: dict[int, Tensor] | None = None
    """Experts that this rank's routers chose for the row as it lies here, by layer, for later passes to choose again;
    given empty, the engine's first pass fills it in. Of this process alone."""
    sampler_routes: Tensor | None = None
    """[T, layers, chosen] int16 on the host: experts that the sampler sent each token through, for every pass to choose
    again. -1 where it sent none: the last token of a sequence chooses for itself, and no loss depends on it."""
    sample_numbers: tuple[int, ...] = ()
    """Which sample each sequence is, as whoever packed the row counts them; empty where nobody asks."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the row, T."""
        return int(self.tokens.shape[0])

    @property
    def num_trained(self) -> int:
        """Tokens that carry a weight."""
        return int((self.weights != 0).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimizer step did, the same on every rank."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_trained_tokens: int
    num_sequences: int
    skipped: bool = False
    """True when the loss or the gradient was not finite and the weights were left alone."""
    metrics: dict[str, float] = field(default_factory=dict)


KLEstimator = Literal["k3", "k2", "k3_unbiased", "k3_weighted"]
"""Forms of the KL term to a reference, in the order of the fused kernel's numbers; see `kernels.reference.kl_term`."""


class LossKind(IntEnum):
    """Members of the token-loss family that the fused kernel computes; the numbers are part of its C interface."""

    NLL = 0
    REINFORCE = 1
    PPO = 2
    GPPO = 3
    CISPO = 4
    SAPO = 5
    DPPO_TV = 6
    DPPO_KL = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCoefficients:
    """All the fused kernel needs to know of a loss: its kind and the constants of its gradient weight.

    Bounds are absolute ratios (`1 - clip_low`, `1 + clip_high`), `dual_clip` is infinite where there is none.
    `beta_low` and `beta_high` belong to tokens of negative and of other advantage: the weight of a clipped gradient
    (GPPO), the temperature (SAPO), the bound of the divergence (DPPO).
    """

    kind: LossKind
    ratio_low: float = 0.0
    ratio_high: float = float("inf")
    beta_low: float = 1.0
    beta_high: float = 1.0
    dual_clip: float = float("inf")


class TokenLoss(Protocol):
    """A loss over tokens: it sees per-token tensors, returns per-token losses, and knows no mask, mean or rank."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor | None) -> Tensor:
        """Per-token losses [T], differentiable in `logprobs` [T]."""
        ...

    def coefficients(self) -> LossCoefficients | None:
        """The loss in the fused kernel's terms, None where it is not of the family."""
        ...
