"""The stream of prompts to roll out: several sources mixed by weight, shuffled by a seed, at a position to save."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_klear.data.rows import DataError, ProblemRow
from megatron_klear.types import Prompt

from .problems import ProblemSource, read_problems
from .tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)


class PromptStream:
    """Prompts without end, the same on every rank.

    Sources take turns so that at every point each has had its weight's share. Each source goes through its own prompts
    epoch after epoch, every prompt once an epoch, shuffled anew each time; with one source an epoch is the whole data.

    A prompt's id is a digest of its problem, so that it stays the same when files are split, merged or reordered;
    repeats of a problem are told apart by `#2`, `#3`.
    """

    overlong: int
    """Prompts left out because they are longer than `max_tokens`."""
    excluded: int
    """Prompts left out because `exclude` names them."""

    def __init__(
        self,
        sources: Sequence[ProblemSource],
        tokenizer: ChatTokenizer,
        *,
        max_tokens: int,
        seed: int,
        thinking: bool | None = None,
        exclude: Collection[str] = (),
        key: str = "prompts.sources",
    ) -> None:
        """Read and tokenize all sources. `exclude` are ids, for example those of the validation prompts.

        Raises DataError where a source is wrong or has no prompt left.
        """
        self._seed, self._weights = seed, np.array([source.weight for source in sources], dtype=np.float64)
        self.overlong = self.excluded = 0
        self._prompts: list[list[Prompt]] = []
        seen: Counter[str] = Counter()
        for index, source in enumerate(sources):
            where = f"{key}[{index}]"
            before = self.overlong, self.excluded
            kept = []
            for place, row in read_problems(source, where, seed):
                prompt = self._prompt(place, row, tokenizer, thinking, seen)
                if prompt.id.partition("#")[0] in exclude or prompt.id in exclude:
                    self.excluded += 1
                elif len(prompt.tokens) > max_tokens:
                    self.overlong += 1
                else:
                    kept.append(prompt)
            if not kept:
                raise DataError(
                    f"{where}: no prompt is left: {self.overlong - before[0]} are longer than prompts.max_tokens "
                    f"{max_tokens}, {self.excluded - before[1]} are held out; is the source empty?"
                )
            self._prompts.append(kept)
        if self.overlong:
            logger.warning("%d prompts are longer than %d tokens and are left out", self.overlong, max_tokens)
        self._taken = np.zeros(len(sources), dtype=np.int64)
        self._orders: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Prompts in all sources together."""
        return sum(len(prompts) for prompts in self._prompts)

    @property
    def ids(self) -> frozenset[str]:
        """Ids of all prompts."""
        return frozenset(prompt.id for prompts in self._prompts for prompt in prompts)

    @property
    def data_sources(self) -> frozenset[str]:
        """All `data_source` values, each of which needs a reward."""
        return frozenset(prompt.data_source for prompts in self._prompts for prompt in prompts)

    @property
    def epochs(self) -> list[float]:
        """How often each source has been gone through."""
        return [int(taken) / len(prompts) for taken, prompts in zip(self._taken, self._prompts, strict=True)]

    @property
    def all(self) -> list[Prompt]:
        """Every prompt once, in the order of the sources: what a validation goes through. Moves no position."""
        return [prompt for prompts in self._prompts for prompt in prompts]

    def replace(self, change: Callable[[Prompt], Prompt]) -> None:
        """Have `change` of every prompt in its place, once, in the order of `all`. Ids and positions stay."""
        self._prompts = [[change(prompt) for prompt in prompts] for prompts in self._prompts]

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        return [self._next() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """The position, with what it is only valid for."""
        return {"taken": self._taken.tolist(), "made_with": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises DataError where the data or settings would not give the same prompts."""
        here = self._identity()
        changed = [name for name in here if state["made_with"].get(name) != here[name]]
        if changed:
            told = ", ".join(f"{name} was {state['made_with'].get(name)} and is {here[name]}" for name in changed)
            raise DataError(
                f"the checkpoint's position in the prompts does not fit this run: {told}; restore these settings and "
                "files, or start a new run from the checkpoint's weights (model.checkpoint)"
            )
        self._taken = np.array(state["taken"], dtype=np.int64)

    def _next(self) -> Prompt:
        behind = (self._taken + 1) / self._weights
        source = int(np.argmin(behind))  # the first of equals
        prompts = self._prompts[source]
        epoch, place = divmod(int(self._taken[source]), len(prompts))
        self._taken[source] += 1
        return prompts[int(self._order(source, epoch)[place])]

    def _order(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            generator = np.random.default_rng([self._seed, source, epoch])
            known = self._orders[source] = epoch, generator.permutation(len(self._prompts[source]))
        return known[1]

    def _identity(self) -> dict[str, Any]:
        ids = [prompt.id for prompt in self.all]
        return {
            "seed": self._seed,
            "prompts": [len(prompts) for prompts in self._prompts],
            "weights": self._weights.tolist(),
            "checksum_of_ids": zlib.crc32("\n".join(ids).encode()),
        }

    @staticmethod
    def _prompt(
        place: str, row: ProblemRow, tokenizer: ChatTokenizer, thinking: bool | None, seen: Counter[str]
    ) -> Prompt:
        try:
            text = tokenizer.template.render(row.messages, generation_prompt=True, thinking=thinking)
            tokens = tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        name = problem_id(row)
        seen[name] += 1
        return Prompt(
            id=name if seen[name] == 1 else f"{name}#{seen[name]}",
            data_source=row.data_source,
            tokens=tokens,
            text=text,
            ground_truth=row.ground_truth,
            extra_info=row.extra_info,
            place=place,
        )


def problem_id(row: ProblemRow) -> str:
    """A name that depends on the problem alone: its source, messages and ground truth."""
    content = json.dumps([row.data_source, row.messages, row.ground_truth], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
