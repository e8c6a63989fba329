"""Rewards of a user's own: how they want to be called, and what they may answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_klear.types import Score, Verdict

_OPTIONAL = ("data_source", "extra_info")
EXPECTED = (
    "expected (response, ground_truth), with `extra_info` or `data_source` besides if it needs them, or verl's "
    "(data_source, solution_str, ground_truth, extra_info)"
)


class SignatureError(TypeError):
    """A function that cannot be called as a reward."""


class OwnReward:
    """A user's function behind the protocol. Raises SignatureError where it does not take what a reward is given."""

    def __init__(self, function: Callable[..., object]) -> None:
        if inspect.isclass(function):
            raise SignatureError(f"is a class; {EXPECTED}: name a function, or an instance that can be called")
        if inspect.iscoroutinefunction(function):
            raise SignatureError("is an async function, and a reward is called from none; make it an ordinary one")
        self._function = function
        self._verl, self._extras = _read_signature(function)

    def __call__(
        self, response: str, ground_truth: Any, *, data_source: str = "", extra_info: Mapping[str, Any] | None = None
    ) -> Score:
        """The score; raises where the function does, or answers something that is no score."""
        extras = {"data_source": data_source, "extra_info": {} if extra_info is None else extra_info}
        taken = {name: extras[name] for name in self._extras}
        if self._verl:
            result = self._function(solution_str=response, ground_truth=ground_truth, **taken)
            result = result["score"] if isinstance(result, dict) and "score" in result else result
        else:
            result = self._function(response, ground_truth, **taken)
        score = result if isinstance(result, Score) else _score(result)
        if not math.isfinite(score.reward):
            raise ValueError(f"the reward returned {score.reward}, which is not finite")
        return score


def _score(result: object) -> Score:
    """What float() takes is a number, numpy's bools and scalars too; a text is none."""
    try:
        if isinstance(result, str | bytes) or not hasattr(type(result), "__float__"):
            raise TypeError
        reward = float(result)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"the reward returned {type(result).__name__}, expected a Score or a number") from None
    return Score(reward=reward, verdict=Verdict.RIGHT if reward > 0 else Verdict.WRONG)


def _read_signature(function: Callable[..., object]) -> tuple[bool, tuple[str, ...]]:
    """Whether the function has verl's signature, and which of the optional arguments it takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C: it takes what it takes
        return False, ()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    verl = "solution_str" in named
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # The first two of an ordinary reward are the response and the ground truth, whatever their names.
    given = set() if verl else set(positional[:2])
    extras = tuple(name for name in _OPTIONAL if name not in given and (name in named or (verl and anything)))
    if not verl and given & set(_OPTIONAL):
        raise SignatureError(f"takes ({', '.join(parameters)}); {EXPECTED}")
    blank: dict[str, object] = dict.fromkeys(extras, "")
    try:
        if verl:
            inspect.signature(function).bind(solution_str="", ground_truth="", **blank)
        else:
            inspect.signature(function).bind("", "", **blank)
    except TypeError as error:
        told = f"takes ({', '.join(parameters)}) and cannot be called as a reward ({error})"
        raise SignatureError(f"{told}; {EXPECTED}") from None
    return verl, extras
