"""Arithmetic problems with a worked chain of thought, made from a seed: data that a tiny model can learn in minutes.

Every row serves both stages: `prompt` and `response` for supervised fine-tuning, `prompt` and
`reward_model.ground_truth` for reinforcement learning.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

_TEMPLATES = (
    "Compute {expression}.",
    "What is {expression}?",
    "Find the value of {expression}.",
)
INSTRUCTION = " Put the final answer in \\boxed{}."


def arithmetic_rows(
    count: int, *, seed: int = 0, terms: int = 3, digits: int = 2, operators: str = "+-*", slip_share: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield `count` problems of two up to `terms` numbers with up to `digits` digits each.

    `operators` are those of the first step, of which `*` is never taken later. Of the steps in the worked answer,
    `slip_share` get a result that is off by up to 3 and is carried on, so that there is something left to learn from
    the true answer; the ground truth has no slips. The same arguments give the same rows on every machine. Raises
    ValueError where `count` is negative, `terms` is below 2, `digits` below 1, or the other two make no sense.
    """
    if count < 0 or terms < 2 or digits < 1:
        raise ValueError(f"arithmetic rows need count >= 0, terms >= 2, digits >= 1; got {count}, {terms}, {digits}")
    later = operators.replace("*", "")
    if not later or set(operators) - set("+-*"):
        raise ValueError(f"arithmetic operators must be among +-*, and not * alone; got {operators!r}")
    if not 0 <= slip_share <= 1:
        raise ValueError(f"arithmetic slip_share must lie in [0, 1]; got {slip_share}")
    rng, slips = random.Random(seed), random.Random(f"slips of {seed}")
    for _ in range(count):
        numbers = [rng.randrange(10 ** rng.randint(1, digits)) for _ in range(rng.randint(2, terms))]
        chosen = [rng.choice(operators if i == 0 else later) for i in range(len(numbers) - 1)]
        question = rng.choice(_TEMPLATES)
        offsets = [slips.choice((-3, -2, -1, 1, 2, 3)) if slips.random() < slip_share else 0 for _ in chosen]
        yield _row(numbers, chosen, question, offsets)


def training_row(prompt: str, thinking: str, conclusion: str, answer: str, source: str) -> dict[str, Any]:
    """One row in the form that both stages read; the conclusion should hold the boxed answer."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "response": f"<think>\n{thinking}\n</think>\n\n{conclusion}",
        "data_source": source,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
    }


def _row(numbers: list[int], operators: list[str], question: str, offsets: list[int]) -> dict[str, Any]:
    expression = " ".join([str(numbers[0]), *(f"{op} {n}" for op, n in zip(operators, numbers[1:], strict=True))])
    steps, written, true = [], numbers[0], numbers[0]
    for operator, number, offset in zip(operators, numbers[1:], offsets, strict=True):
        result = _apply(operator, written, number) + offset
        steps.append(f"{written} {operator} {number} = {result}")
        written, true = result, _apply(operator, true, number)
    prompt = question.format(expression=expression) + INSTRUCTION
    return training_row(prompt, "\n".join(steps), f"The answer is \\boxed{{{written}}}.", str(true), "arithmetic")


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]
