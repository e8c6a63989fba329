"""What ends a response: one rule for supervised training, rollouts, validation and exported folders.

A chat model ends its turn with the token that its template writes there, which supervised training teaches. Base models
name another one (`<|endoftext|>` beside ChatML's `<|im_end|>`): a sampler that knows theirs alone never stops, and so
does a server of the exported folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_klear.errors import UserError

_GENERATION, _CONFIG = "generation_config.json", "config.json"
_SPECIAL_IDS = ("bos_token_id", "pad_token_id")


class StopTokenError(UserError, ValueError):
    """A generation_config.json or config.json whose `eos_token_id` cannot be read."""


class NamedToken(NamedTuple):
    """A token of the vocabulary and its text."""

    id: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StopTokens:
    """The tokens that end a response, and what a person should be told of them."""

    ids: tuple[int, ...]
    """The end of turn first, then the model's own."""
    turn_end: int | None
    """The token that the chat template ends an assistant turn with; None where it writes none to stop at."""
    note: str = ""
    """One line where the model's own end is another token than the template's; empty where all agree."""


def stop_tokens(
    *,
    turn_end: NamedToken | None,
    tokenizer_eos: NamedToken | None,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> StopTokens:
    """Every token that one of the four names as an end.

    `turn_end` is the template's, `tokenizer_eos` the tokenizer's `eos_token`; the settings are a model folder's
    generation_config.json and config.json, empty where there is none. Raises StopTokenError on an `eos_token_id` that
    is neither a token id, a list of them, nor null.
    """
    own = dict.fromkeys([*eos_ids(generation_config, _GENERATION), *eos_ids(config, _CONFIG)])
    if tokenizer_eos is not None:
        own.setdefault(tokenizer_eos.id)
    if turn_end is None:
        ends = f"the model's own ({', '.join(map(str, own))})" if own else "nothing but sampling.max_tokens"
        note = f"the chat template ends an assistant turn with no token to stop at: responses end at {ends}"
        return StopTokens(ids=tuple(own), turn_end=None, note=note)
    note = ""
    if turn_end.id not in own:
        text = f"{tokenizer_eos.text} ({tokenizer_eos.id})" if tokenizer_eos else ", ".join(map(str, own)) or "none"
        note = (
            f"turns end in {turn_end.text} ({turn_end.id}), as the chat template writes them, and the model's eos is "
            f"{text}: turns are trained with the template's, responses end at either, and saved folders name both"
        )
    return StopTokens(ids=tuple(dict.fromkeys([turn_end.id, *own])), turn_end=turn_end.id, note=note)


def read_stop_tokens(folder: Path, *, turn_end: NamedToken | None, tokenizer_eos: NamedToken | None) -> StopTokens:
    """`stop_tokens` of a model folder. Raises StopTokenError where its files cannot be read."""
    return stop_tokens(
        turn_end=turn_end,
        tokenizer_eos=tokenizer_eos,
        generation_config=_read(folder / _GENERATION),
        config=_read(folder / _CONFIG),
    )


def eos_ids(settings: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """The ids under `eos_token_id`: one, a list, or none; `source` names the file in errors."""
    named = settings.get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise StopTokenError(f"{source}: eos_token_id is {named!r}, expected a token id, a list of them, or null")
    return tuple(ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """How training wrote chats, for the folders that it leaves: who serves one writes them alike."""

    end: int | None = None
    """The token that ends a turn, to be named among the ends of a response; None where that is not known."""
    template: str | None = None
    """The chat template trained with, where it is not the model's own."""


def name_turn_end(folder: Path, turn_end: int | None) -> None:
    """Have a model folder's generation_config.json and config.json name the end of turn, first among their ends.

    transformers' `generate`, vLLM and SGLang stop at every id of such a list. A file that names it already stays byte
    for byte; a generation_config.json that is missing is written, since `generate` would else know config.json alone.
    """
    if turn_end is None:
        return
    config = _read(folder / _CONFIG)
    generation = _read(folder / _GENERATION)
    if not generation:
        generation = {name: config[name] for name in ("eos_token_id", *_SPECIAL_IDS) if config.get(name) is not None}
    for name, settings in ((_GENERATION, generation), (_CONFIG, config)):
        path = folder / name
        known = eos_ids(settings, str(path))
        if turn_end not in known:
            named = [turn_end, *known] if known else turn_end
            path.write_text(json.dumps({**settings, "eos_token_id": named}, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StopTokenError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise StopTokenError(f"{path} holds no object")
    return settings
