"""What a rollout engine is: a few verbs. It lives in the orchestrator, and its weights in the trainer.

The sampler's log-probs are those of the distribution really sampled from: after temperature, top-k and top-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_klear.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from megatron_klear.config.rl import SamplingConfig


Checksums = dict[str, dict[str, str]]
"""For every holder of weights, a server or a worker of one: checksum by tensor's name."""


class RolloutEngine(Protocol):
    """Draws responses from the policy whose weights it was given last."""

    @property
    def shares_cards(self) -> bool:
        """Whether it draws on the trainer's own cards, in turns with a trainer that gives its memory back first."""
        ...

    def load_weights(self, version: int) -> Checksums:
        """Have the trainer give its present weights; `version` marks every token drawn from now on.

        Returns what says, for every holder of weights (a server, or a worker of one), what it holds; its keys name
        them. Responses under way go on with the new weights.
        """
        ...

    def probe(self, tokens: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.float32]]:
        """Every server's log-probs [n - 1] of tokens[1:] given what precedes each, at temperature 1.

        Empty where the checksums are those of the very tensors sampled with, which leaves nothing to probe.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Group]:
        """Draw `samples_per_prompt` responses to each prompt.

        A sample depends on the weights, its prompt and a generator seeded by (`seed`, prompt id, number of the sample),
        not on what else is in the batch or on the number of ranks; with servers, up to rounding of their batched
        arithmetic. They leave out groups that they could not get within the deadline, and count them in `counters`.
        """
        ...

    def counters(self) -> dict[str, float]:
        """What happened since the last call, to be logged: `server_retries`, `groups_dropped`; then starts anew."""
        ...

    def sleep(self) -> None:
        """Give back memory that only sampling needs, until the next `load_weights`."""
        ...

    def close(self) -> None:
        """End what the engine started: connections, servers, files."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRequest:
    """Responses to draw to one prompt. `seed` with the prompt's id and a sample's number seeds each of them."""

    prompt: Prompt
    sampling: SamplingConfig
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedGroup:
    """A request that ended: with its group, or without one and why."""

    request: GroupRequest
    group: Group | None
    failure: str = ""
    followed: tuple[Any, ...] = ()
    """What `follow` gave for each of the responses, in order; empty where nothing follows them."""


class BackgroundRollouts(RolloutEngine, Protocol):
    """A rollout engine that draws while the caller does other work.

    All from one thread. `load_weights` may be called with requests under way: their tokens before and after it are
    told apart by `version_spans`.
    """

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Queue requests and return at once."""
        ...

    def follow(self, begin: Callable[[Prompt, str], Any]) -> None:
        """Have `begin(prompt, text)` called for every response as soon as it is whole, before its group is.

        It is called from another thread, and must return at once and raise nothing; what it returns comes with the
        group. So a response is graded while others of its group are still drawn. To be called before `submit`.
        """
        ...

    def take(self, timeout_seconds: float) -> list[FinishedGroup]:
        """Requests that ended since the last call, waiting for the first of them at most so long; may be empty.

        Raises UserError where no server is left to answer.
        """
        ...

    @property
    def in_flight(self) -> int:
        """Requests submitted and not taken yet."""
        ...

    def notices(self) -> list[str]:
        """What happened to the run's own servers since the last call, in words."""
        ...

    @property
    def last_progress(self) -> float:
        """When a response was last seen to grow, by time.monotonic; 0 where that is not known."""
        ...

    @property
    def needs_weights(self) -> bool:
        """Whether a server came back without the present weights; it gets no requests until the next `load_weights`."""
        ...


def group_of(
    prompt: Prompt, samples: list[Sample], decode: Callable[[Sequence[int]], str], stop_token_ids: Collection[int]
) -> Group:
    """The samples with the texts that rewards, reports and kept rollouts get: what the model wrote.

    The stop token that ended a response is no part of its text, as `#### 72<|im_end|>` would be another answer than
    `#### 72`; the sample keeps it, since it is trained. Everything before it is shown, special tokens too: in some
    tokenizers `<think>` is one, and a turn header in the middle of an answer is a fault that a reward should see.
    """
    return Group(
        prompt=prompt, samples=samples, texts=[text_of(prompt, sample, decode, stop_token_ids) for sample in samples]
    )


def text_of(
    prompt: Prompt, sample: Sample, decode: Callable[[Sequence[int]], str], stop_token_ids: Collection[int]
) -> str:
    """A response's text as `group_of` gives it."""
    response = sample.tokens[len(prompt.tokens) :].tolist()
    ended = bool(response) and response[-1] in stop_token_ids
    return decode(response[:-1] if ended else response)


def told_apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that come again get an id of their own, so that they are not answered alike: `id~1`, `id~2`."""
    seen: Counter[str] = Counter()
    apart = []
    for prompt in prompts:
        again = seen[prompt.id]
        seen[prompt.id] += 1
        apart.append(replace(prompt, id=f"{prompt.id}~{again}") if again else prompt)
    return apart
