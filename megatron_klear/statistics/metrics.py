"""What a benchmark's samples are worth: avg@k, pass@k, G-pass@k and maj@k of one problem, from its n samples.

Each function speaks of one problem; a benchmark's figure is the mean over its problems. Fewer samples than a metric
needs are an error, never a zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np

Ties = Literal["split", "first"]
Answer = TypeVar("Answer")

_SEED = 0


def avg_at_k(right: Sequence[bool], k: int | None = None) -> float:
    """Share of right ones among the first `k` samples (None: all): pass@1 estimated from k samples."""
    k = len(right) if k is None else k
    _check(len(right), k)
    return sum(map(bool, right[:k])) / k


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that of k samples drawn from the n without replacement some is right.

    1 - C(n - c, k) / C(n, k), as a product (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    _check(num_samples, k, num_right)
    wrong = num_samples - num_right
    if wrong < k:
        return 1.0
    return 1.0 - math.prod((wrong - i) / (num_samples - i) for i in range(k))


def g_pass_at_k(num_samples: int, num_right: int, k: int, threshold: float) -> float:
    """Probability that of k samples drawn from the n at least ceil(threshold * k), and at least one, are right.

    G-Pass@k of Liu et al. 2024 (arXiv 2412.13147, equation 5); 1 / k and less is pass@k.
    """
    _check(num_samples, k, num_right)
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold of G-pass@k is a share, not {threshold}")
    least = max(math.ceil(threshold * k), 1)
    ways = sum(
        math.comb(num_right, right) * math.comb(num_samples - num_right, k - right)
        for right in range(least, min(num_right, k) + 1)
    )
    return ways / math.comb(num_samples, k)


def mg_pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The mean of G-pass@k over thresholds from a half to one: 2/k times its sum over i/k, i from ceil(k/2)+1 to k.

    arXiv 2412.13147, equation 7.
    """
    thresholds = (i / k for i in range(math.ceil(0.5 * k) + 1, k + 1))
    return 2 / k * sum(g_pass_at_k(num_samples, num_right, k, threshold) for threshold in thresholds)


def maj_at_k(
    votes: Sequence[Hashable | None],
    right: Sequence[bool],
    k: int | None = None,
    *,
    ties: Ties = "split",
    draws: int = 200,
) -> float:
    """Probability that the answer given most often among k samples is right.

    `votes` are the samples' answers, equal where they mean the same (`vote`); None is an answer that cannot be read: it
    has no vote, and counts as one of the k. Of answers given equally often each wins with the same probability
    (`split`), or the one that came first does (`first`, as lighteval has it). Where k is below n the mean over `draws`
    subsets, drawn from a fixed seed. Raises ValueError where votes and verdicts differ in number.
    """
    n = len(votes)
    k = n if k is None else k
    _check(n, k)
    if len(right) != n:
        raise ValueError(f"{n} votes and {len(right)} verdicts: each sample has one of each")
    if k == n:
        return _majority(votes, right, range(n), ties)
    rng = np.random.default_rng(_SEED)
    subsets = (sorted(rng.choice(n, size=k, replace=False).tolist()) for _ in range(draws))
    return sum(_majority(votes, right, subset, ties) for subset in subsets) / draws


def vote(answers: Sequence[Answer | None], same: Callable[[Answer, Answer], bool]) -> list[int | None]:
    """A number for each answer, the same for answers that mean the same; None stays None.

    An answer goes to the first earlier one that it equals, since `same` need not be transitive.
    """
    leaders: list[Answer] = []
    numbers: list[int | None] = []
    for answer in answers:
        if answer is None:
            numbers.append(None)
            continue
        number = next((i for i, leader in enumerate(leaders) if same(leader, answer)), len(leaders))
        if number == len(leaders):
            leaders.append(answer)
        numbers.append(number)
    return numbers


def _majority(votes: Sequence[Hashable | None], right: Sequence[bool], chosen: Sequence[int], ties: Ties) -> float:
    counts = Counter(votes[i] for i in chosen if votes[i] is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [answer for answer, count in counts.items() if count == most]  # in the order of their first samples
    if ties == "first":
        winners = winners[:1]
    # Samples of one answer may be judged apart where the verdict sees more than the answer: the winner stands for them.
    shares = [[bool(right[i]) for i in chosen if votes[i] == winner] for winner in winners]
    return sum(sum(verdicts) / len(verdicts) for verdicts in shares) / len(winners)


def _check(num_samples: int, k: int, num_right: int = 0) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"a metric over k = {k} samples needs 1 to n of them, and the problem has n = {num_samples}")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} of {num_samples} samples cannot be right")
