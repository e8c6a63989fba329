"""What a rollout engine is: three verbs, collective, the same answer on every rank.

The sampler's log-probs are those of the distribution really sampled from: after temperature, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_klear.types import Group, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_klear.rl_config import SamplingConfig


class RolloutEngine(Protocol):
    """Draws responses from the policy whose weights it was given last."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> dict[str, str]:
        """Take the policy's weights under their Hugging Face names; `version` marks every sample drawn from now on.

        Returns a checksum by name of what the engine holds after loading, for the trainer to compare.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Group]:
        """Draw `samples_per_prompt` responses to each prompt.

        Every rank passes the same prompts and gets all groups, in order. A sample depends on the weights, its prompt
        and a generator seeded by (`seed`, prompt id, number of the sample), not on what else is in the batch or on
        the number of ranks.
        """
        ...

    def sleep(self) -> None:
        """Give back memory that only sampling needs, until the next `load_weights`."""
        ...
