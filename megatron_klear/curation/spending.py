"""What requests cost, and a limit that is kept whatever the servers do: what is under way counts at its most."""

from __future__ import annotations

import asyncio

from megatron_klear.errors import UserError

from .response_store import ResponseStore, Tokens


class SpendLimitError(UserError):
    """No further request fits under the limit on spending."""


class Ledger:
    """Counts what was spent with the model of a store, and lets requests begin while the limit allows.

    An attempt that brought no answer, though the server may have made one, counts at its most; so does one that was
    under way when an earlier process was killed.
    """

    def __init__(self, store: ResponseStore, prices: tuple[float, float], limit: float | None) -> None:
        """`prices` are for a million tokens of prompts and of completions, `limit` is in their currency."""
        self.store, self._prices, self._limit = store, prices, limit
        self._under_way = 0
        self._changed = asyncio.Condition()

    def cost(self, tokens: Tokens) -> float:
        """Price of so many tokens."""
        return sum(count * price for count, price in zip(tokens, self._prices, strict=True)) / 1e6

    @property
    def spent(self) -> float:
        """By answers, as the servers counted them."""
        return self.cost(self.store.used)

    @property
    def unknown(self) -> float:
        """The most that was spent by attempts of which nothing is known, those under way among them."""
        return sum(map(self.cost, self.store.unanswered()))

    def words(self) -> str:
        """In a sentence, for people."""
        prompt, completion = self.store.used
        told = f"{prompt} prompt and {completion} completion tokens of {self.store.answers} answers"
        if any(self._prices):
            limit = "" if self._limit is None else f" of {self._limit:g}"
            told = f"spent {self.spent:.6g}{limit} on {told}"
        if (attempts := len(self.store.unanswered())) > 0:
            most = f", which cost {self.unknown:.6g} at most" if any(self._prices) else ""
            told += f"; {attempts} attempts without a known end{most}"
        return told

    async def reserve(self, key: bytes, at_most: Tokens) -> None:
        """Begin an attempt, once it fits under the limit; waits while others are under way that may cost less.

        Raises SpendLimitError where it does not fit though nothing is under way.
        """
        async with self._changed:
            while self._limit is not None and self.spent + self.unknown + self.cost(at_most) > self._limit:
                if self._under_way == 0:
                    raise SpendLimitError(
                        f"the next request costs up to {self.cost(at_most):.6g}, which is beyond endpoint.max_spend "
                        f"{self._limit:g}: {self.words()}. What has come is kept: raise the limit and start the same "
                        "command again, or pass --recorded for the rows of what is there"
                    )
                await self._changed.wait()
            self._under_way += 1
            self.store.asked(key, at_most)

    async def release(self) -> None:
        """An attempt has ended, and the store knows how."""
        async with self._changed:
            self._under_way -= 1
            self._changed.notify_all()
