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


def arithmetic_rows(count: int, *, seed: int = 0, terms: int = 3, digits: int = 2) -> Iterator[dict[str, Any]]:
    """Yield `count` problems of two up to `terms` numbers with up to `digits` digits each.

    The same arguments give the same rows on every machine. Raises ValueError where `count` is negative, `terms` is
    below 2 or `digits` below 1.
    """
    if count < 0 or terms < 2 or digits < 1:
        raise ValueError(f"arithmetic rows need count >= 0, terms >= 2, digits >= 1; got {count}, {terms}, {digits}")
    rng = random.Random(seed)
    for _ in range(count):
        numbers = [rng.randrange(10 ** rng.randint(1, digits)) for _ in range(rng.randint(2, terms))]
        operators = [rng.choice("+-*" if i == 0 else "+-") for i in range(len(numbers) - 1)]
        question = rng.choice(_TEMPLATES)
        yield _row(numbers, operators, question)


def training_row(prompt: str, thinking: str, conclusion: str, answer: str, source: str) -> dict[str, Any]:
    """One row in the form that both stages read; the conclusion should hold the boxed answer."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "response": f"<think>\n{thinking}\n</think>\n\n{conclusion}",
        "data_source": source,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
    }


def _row(numbers: list[int], operators: list[str], question: str) -> dict[str, Any]:
    expression = " ".join([str(numbers[0]), *(f"{op} {n}" for op, n in zip(operators, numbers[1:], strict=True))])
    steps, value = [], numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        result = {"+": value + number, "-": value - number, "*": value * number}[operator]
        steps.append(f"{value} {operator} {number} = {result}")
        value = result
    prompt = question.format(expression=expression) + INSTRUCTION
    return training_row(prompt, "\n".join(steps), f"The answer is \\boxed{{{value}}}.", str(value), "arithmetic")
