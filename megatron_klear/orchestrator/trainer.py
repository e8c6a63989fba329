"""What the orchestrator asks of the trainer, and rollout engines whose weights are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from megatron_klear.rollout.engine import Checksums, RolloutEngine, group_of, told_apart
from megatron_klear.types import Group, Prompt, Sample

if TYPE_CHECKING:
    from megatron_klear.config.rl import SamplingConfig
    from megatron_klear.rollout.vllm.client import Portal, ServerClient

PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """What came of weights that were sent to servers."""

    holders: tuple[str, ...]
    """Workers of servers that got everything: "<address> worker <n>"."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """By the address of a server that did not, why."""


class Sender(Protocol):
    """The ranks that train, as they send weights to servers. Collective on their side."""

    def make_room(self) -> None:
        """Give memory back before servers on the trainer's own cards wake."""
        ...

    def deliver(self, version: int, urls: Sequence[str], gone: Sequence[str]) -> Delivery:
        """Send the present weights to the servers of these addresses; those of `gone` were restarted since.

        Raises WeightsNotArrived where what a server holds is not what was sent.
        """
        ...

    def check_echo(self, version: int, answers: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Compare every server's log-probs of `probe_row` with the trainer's own. Raises WeightsNotArrived."""
        ...


class Drawer(Protocol):
    """The ranks that train, as they draw themselves. Collective on their side."""

    def load(self, version: int) -> None:
        """Give the present weights to the trainer's own sampler. Raises WeightsNotArrived."""
        ...

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[list[Sample]]:
        """Samples of each prompt by the trainer's own sampler, which reads the prompts' ids and tokens."""
        ...

    def free(self) -> None:
        """Give back what the trainer's own sampler needs between steps."""
        ...


class Trainer(Sender, Drawer, Protocol):
    """The trainer as the orchestrator calls on it, which it does while the trainer waits; of a run one half is used."""


def probe_row(vocab_size: int) -> npt.NDArray[np.int32]:
    """The fixed row [PROBE_TOKENS] that both sides score: tokens from all over the vocabulary."""
    return np.random.default_rng(20_250_811).integers(0, vocab_size, size=PROBE_TOKENS).astype(np.int32)


def send_weights(rollouts: RolloutEngine, trainer: Sender, version: int, vocab_size: int) -> None:
    """Have the trainer give its weights to the engine under a version, and prove that they are in use there.

    Checksums of every tensor are compared, and where a server may still sample with something else, its log-probs of a
    fixed row with the trainer's. Raises WeightsNotArrived, naming server and tensors.
    """
    if rollouts.shares_cards:
        trainer.make_room()  # before any server wakes: the card does not hold both
    rollouts.load_weights(version)
    answers = rollouts.probe(probe_row(vocab_size))
    if answers:
        trainer.check_echo(version, answers)


class TrainersSampler:
    """A RolloutEngine that has the training processes draw, in between their steps; texts are made here."""

    shares_cards = False
    """It draws within the trainer's processes, whose allocator both use."""

    def __init__(
        self, trainer: Drawer, *, decode: Callable[[Sequence[int]], str], stop_token_ids: Iterable[int]
    ) -> None:
        """`decode` turns token ids into text, special tokens included; `stop_token_ids` are those of the model."""
        self._trainer, self._decode, self._stop = trainer, decode, frozenset(stop_token_ids)

    def load_weights(self, version: int) -> Checksums:
        """Have the trainer load its weights into its sampler."""
        self._trainer.load(version)
        return {"local": {}}

    def probe(self, tokens: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.float32]]:
        """Nothing to probe: checksums are those of the tensors that the decoder reads."""
        return {}

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[Group]:
        """Draw the responses; see RolloutEngine."""
        apart = told_apart(prompts)
        # The ranks that train see no text and no ground truth.
        bare = [replace(prompt, text="", ground_truth=None, extra_info=None) for prompt in apart]
        drawn = self._trainer.draw(bare, sampling, seed)
        stop = self._stop.union(sampling.stop_token_ids)
        return [group_of(prompt, samples, self._decode, stop) for prompt, samples in zip(apart, drawn, strict=True)]

    def counters(self) -> dict[str, float]:
        """Nothing is retried or dropped here."""
        return {"server_retries": 0.0, "groups_dropped": 0.0}

    def sleep(self) -> None:
        """Have the trainer give back the fused copies of the weights."""
        self._trainer.free()

    def close(self) -> None:
        """Nothing was started."""


class TrainersWeights:
    """A Courier that has the training processes send their weights to servers."""

    def __init__(self, trainer: Sender, *, needs_shared_device: bool) -> None:
        self._trainer = trainer
        self.needs_shared_device = needs_shared_device
        self._gone: list[str] = []

    def detach(self, url: str) -> None:
        """Have the trainer forget a server before it sends again."""
        self._gone.append(url)

    def send(self, version: int, servers: Sequence[ServerClient], portal: Portal) -> Checksums:
        """See Courier. The trainer compares the checksums; those that it returns here only name who holds weights."""
        from megatron_klear.rollout.weights.update import TransferFailed

        gone, self._gone = self._gone, []
        delivery = self._trainer.deliver(version, [server.url for server in servers], gone)
        held: Checksums = {holder: {} for holder in delivery.holders}
        if delivery.failures:
            raise TransferFailed(version, dict(delivery.failures), held)
        return held

    def close(self) -> None:
        """The trainer closes what is its own."""
