"""What a reward is, the values it gives, and which one a `data_source` gets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_klear.errors import UserError
from megatron_klear.types import Score, Verdict

from .code.settings import CodeSettings, too_short
from .format import Thinking
from .own import OwnReward as _Yours
from .own import SignatureError
from .truths import TruthError, read_truths

SchemeName = Literal["paper", "released"]


class RewardError(UserError, ValueError):
    """A reward that cannot be found or used; the message names the setting and the remedy."""


class Reward(Protocol):
    """Judges one response. Runs in a worker process, in its main thread, and imports no torch.

    A reward of your own may return a plain number instead: the verdict is then `right` where it is above 0.
    """

    def __call__(self, response: str, ground_truth: Any) -> Score:
        """The score of a response to a prompt whose row held `ground_truth`.

        `response` begins with what the prompt wrote of its thinking, if anything (`format.complete`).
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Reward values by outcome."""

    right: float
    wrong: float
    malformed: float
    """No answer can be read."""
    not_opened: float
    """`</think>` is there, but no `<think>` at the start."""
    not_closed: float
    """No `</think>`: in most cases cut off at the length cap."""

    def value(self, verdict: Verdict, thinking: Thinking = Thinking.KEPT) -> float:
        """The reward of a response; a broken thinking format overrides the verdict."""
        if thinking is Thinking.NOT_OPENED:
            return self.not_opened
        if thinking is Thinking.NOT_CLOSED:
            return self.not_closed
        if thinking is Thinking.REPEATED or verdict is Verdict.MALFORMED:
            return self.malformed
        return self.right if verdict is Verdict.RIGHT else self.wrong


SCHEMES: Mapping[SchemeName, Scheme] = {
    "paper": Scheme(right=1.0, wrong=-1.0, malformed=-1.0, not_opened=-1.0, not_closed=-1.0),
    "released": Scheme(right=1.0, wrong=-1.0, malformed=-1.0, not_opened=-2.0, not_closed=-0.5),
}
"""`paper`: binary, with thinking required (arXiv 2508.07629, section 3). `released`: as the published code has it,
where an unfinished response scores above a wrong one."""

_MATH = "megatron_klear.rewards.math:MathReward"
_CHOICE = "megatron_klear.rewards.choice:ChoiceReward"
_CODE = "megatron_klear.rewards.code.reward:CodeReward"
BUILT_IN: Mapping[str, str] = {
    **dict.fromkeys(("math", "gsm8k", "arithmetic", "aime", "amc", "hmmt"), _MATH),
    # data_source values of verl's prepared data, and names of data sets on the hub
    **dict.fromkeys(("aimo", "asdiv", "big-math", "beyondaime", "brumo", "cmimc", "dapo-math", "deepmath"), _MATH),
    **dict.fromkeys(
        ("deepscaler", "gsm-plus", "gsm-symbolic", "gsm_symbolic", "mawps", "minerva", "minervamath"), _MATH
    ),
    **dict.fromkeys(
        ("multiarith", "numina", "numinamath", "olympiad", "olympiadbench", "omni-math", "openr1-math"), _MATH
    ),
    **dict.fromkeys(("openmathinstruct", "openmathreasoning", "orz", "svamp", "skywork-math"), _MATH),
    **dict.fromkeys(("multiple_choice", "gpqa", "mmlu"), _CHOICE),
    "reasoning_gym": "megatron_klear.rewards.reasoning_gym:ReasoningGymReward",
    **dict.fromkeys(("code", "coder1_longcot", "livecodebench", "lcb", "lcbv5", "humaneval", "humanevalplus"), _CODE),
    **dict.fromkeys(("mbpp", "mbppplus", "leetcode", "leetcodedataset", "codeforces", "code_contests"), _CODE),
    **dict.fromkeys(("codecontests", "taco", "apps", "kodcode", "primeintellect", "deepcoder"), _CODE),
    **dict.fromkeys(("verifiable-coding-problems", "klearreasoner-codesub"), _CODE),
    **dict.fromkeys(("primeintellect/numinamath", "klearreasoner-mathsub"), _MATH),
}
"""Rewards that come with the package, by the start of the `data_source` or of its last path component, without case;
classes made with the reward's settings."""
_MOST_TOLD = 3
_TOLD = ("math", "gsm8k", "arithmetic", "aime", "amc", "hmmt", "multiple_choice", "reasoning_gym", "code")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSettings:
    """The part of `[reward]` that rewards themselves read."""

    scheme: SchemeName = "paper"
    require_thinking: bool = True
    functions: Mapping[str, str] | None = None
    code: CodeSettings = field(default_factory=CodeSettings)


def find(data_source: str, functions: Mapping[str, str] | None = None) -> tuple[str, bool]:
    """Dotted path of the reward of a `data_source`, and whether it comes with the package.

    A name fits a `data_source`, or what follows its last slash, that equals it or goes on with anything but a letter,
    without case: `math` fits `math_longcot` and `HuggingFaceH4/MATH-500`, not `mathematica`. The longest name wins, and
    yours (`reward.functions`) before a built-in of the same length. Yours may stand for a built-in, by its name or
    its path. Raises RewardError where no name fits.
    """
    yours = functions or {}
    names = [(len(name), name in yours, name) for name in {*yours, *BUILT_IN} if _fits(name, data_source)]
    if not names:
        raise RewardError(
            f"no reward for data_source {data_source!r}: built in are {', '.join(_TOLD)} and the usual sets of maths "
            f'problems; name a built-in or one of your own in [reward.functions], "{data_source}" = "math" or '
            f'"{data_source}" = "my_module:my_reward"'
        )
    name = max(names)[2]
    if name not in yours:
        return BUILT_IN[name], True
    path = BUILT_IN.get(yours[name].casefold(), yours[name])
    return path, path in BUILT_IN.values()


def check_sources(data_sources: Iterable[str], functions: Mapping[str, str] | None = None) -> None:
    """Raise RewardError where a data source has no reward; imports none of them."""
    for data_source in sorted(set(data_sources)):
        find(data_source, functions)


def check_truths(rows: Iterable[tuple[str, str, Any]], functions: Mapping[str, str] | None = None) -> None:
    """Raise RewardError where a ground truth cannot be read by the reward of maths or of code; for all rows of a run.

    It is cheap. A row is its place as errors name it, its `data_source` and its ground truth. What a reward of your own
    takes only it knows.
    """
    paths: dict[str, str] = {}
    bad: list[str] = []
    for place, data_source, ground_truth in rows:
        if data_source not in paths:
            paths[data_source] = find(data_source, functions)[0]
        try:
            if paths[data_source] == _MATH:
                read_truths(ground_truth)
            elif paths[data_source] == _CODE:
                _check_code(ground_truth)
        except TruthError as error:
            bad.append(f"{place} (data_source {data_source!r}): {error}")
    if bad:
        told = "; ".join(bad[:_MOST_TOLD]) + (f"; and {len(bad) - _MOST_TOLD} more" if len(bad) > _MOST_TOLD else "")
        raise RewardError(
            f"{told}. Mend or remove what cannot be read, or give its data_source another reward in [reward.functions]"
        )


def resolve(data_source: str, settings: RewardSettings) -> Reward:
    """The reward of a `data_source`, imported and ready. Raises RewardError where it cannot be."""
    path, built_in = find(data_source, settings.functions)
    found = _import(path)
    if built_in:
        own = {"settings": settings.code} if path == _CODE else {}
        reward: Reward = found(SCHEMES[settings.scheme], require_thinking=settings.require_thinking, **own)
        return reward
    try:
        return _Yours(found)
    except SignatureError as error:
        raise RewardError(f"[reward.functions]: {path!r} {error}") from None


def failure_value(data_source: str, settings: RewardSettings, verdict: Verdict) -> float:
    """The reward of a response that could not be graded: what its data source gives to a wrong one."""
    if find(data_source, settings.functions)[0] == _CODE:
        return settings.code.wrong
    return SCHEMES[settings.scheme].value(verdict)


def prepare(reward: Reward) -> None:
    """Let a built-in reward start what it needs besides itself. Raises RewardError where it cannot."""
    if not isinstance(reward, _Yours) and hasattr(reward, "prepare"):
        reward.prepare()


def judge(
    reward: Reward, response: str, ground_truth: Any, *, data_source: str, extra_info: Mapping[str, Any] | None
) -> Score:
    """The score of a response; a reward of your own is given what it asks for besides."""
    if isinstance(reward, _Yours):
        return reward(response, ground_truth, data_source=data_source, extra_info=extra_info)
    return reward(response, ground_truth)


def check_time(data_sources: Iterable[str], settings: RewardSettings, timeout_seconds: float) -> None:
    """Raise RewardError where one of the data sources is of code, and a response's time is too short for its tests."""
    for data_source in sorted(set(data_sources)):
        if find(data_source, settings.functions)[0] == _CODE and (words := too_short(settings.code, timeout_seconds)):
            raise RewardError(f"data_source {data_source!r} is of code: {words}")


def _check_code(ground_truth: Any) -> None:
    from .code.forms import FormError, check_form

    try:
        check_form(ground_truth)
    except FormError as error:
        raise TruthError(str(error)) from None


def _fits(name: str, data_source: str) -> bool:
    name, whole = name.casefold(), data_source.casefold()
    return any(
        text.startswith(name) and not text[len(name) : len(name) + 1].isalpha()
        for text in (whole, whole.rpartition("/")[2])
    )


def _import(path: str) -> Callable[..., Any]:
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise RewardError(
            f'[reward.functions]: {path!r} must have the form "module:function", or be a built-in: {", ".join(_TOLD)}'
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"[reward.functions]: {path!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from None
    if not callable(found):
        raise RewardError(f"[reward.functions]: {path!r} is not a function")
    function: Callable[..., Any] = found
    return function
