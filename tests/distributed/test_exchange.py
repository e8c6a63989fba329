"""What crosses ranks: each gets what is meant for it, and an error of one is told to all."""

import numpy as np
import pytest
import torch.distributed as dist
from pool import Pool

from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError

RECEIVERS = ((3, 0, 1), (5,), (4, 2))
MARKS = np.frombuffer(b"x" * 70_001, np.uint8)  # may not be written


def verbs() -> dict[str, object]:
    """What every verb gives this rank of six."""
    rank = exchange.rank()
    tokens = 3 * exchange.CHUNK_BYTES // 8 + 5  # of eight bytes: some chunks and a bit
    parts = [{"part": part, "marks": MARKS, "tokens": np.full(tokens, part)} for part in range(3)] if rank == 0 else []
    part = exchange.give_each(parts, RECEIVERS)
    assert part["tokens"].flags.aligned
    assert part["tokens"].flags.writeable
    return {
        "part": part["part"],
        "marks": int(part["marks"].sum()),
        "tokens": (len(part["tokens"]) - tokens, set(part["tokens"].tolist())),
        "told": exchange.tell_all(f"by {rank}"),
        "gathered": exchange.gather_all(rank),
        "first": exchange.gather_first(rank * 10),
        "some": exchange.gather_first(rank, senders=(0, 4, 2)),
        "of first": exchange.from_first_rank(lambda: rank + 7),
        "on first": exchange.on_first_rank(lambda: rank + 7),
        "agreed": exchange.same_outcome(lambda: rank),
    }


def test_every_rank_gets_what_is_meant_for_it(ranks: Pool):
    for rank, found in enumerate(ranks(6, verbs)):
        part = next(number for number, receivers in enumerate(RECEIVERS) if rank in receivers)
        assert found == {
            "part": part,
            "marks": int(MARKS.sum()),
            "tokens": (0, {part}),
            "told": "by 0",
            "gathered": [0, 1, 2, 3, 4, 5],
            "first": [0, 10, 20, 30, 40, 50] if rank == 0 else [],
            "some": [0, 4, 2] if rank == 0 else [],
            "of first": 7,
            "on first": 7 if rank == 0 else None,
            "agreed": rank,
        }


def failing(kind: type[Exception], verb: str) -> str:
    """What this rank raises where one of three fails."""

    def work() -> int:
        if dist.get_rank() == (1 if verb == "same_outcome" else 0):
            raise kind("no room")
        return 1

    try:
        getattr(exchange, verb)(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("verb", ["from_first_rank", "on_first_rank", "same_outcome"])
def test_an_error_of_one_rank_is_every_ranks(ranks: Pool, verb: str):
    assert ranks(3, failing, UserError, verb) == ["UserError: no room"] * 3
    failed = 1 if verb == "same_outcome" else 0
    for rank, told in enumerate(ranks(3, failing, KeyError, verb)):
        others = f"RuntimeError: rank {failed} failed: KeyError('no room')"
        assert told == ("KeyError: 'no room'" if rank == failed else others)


def test_one_process_needs_no_group():
    assert not dist.is_initialized()
    assert exchange.give_each(["all"], [[0]]) == "all"
    assert exchange.gather_first(3) == exchange.gather_all(3) == [3]
    assert exchange.on_first_rank(lambda: 5) == 5
