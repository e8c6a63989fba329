"""The text of each token of a response, from the token ids that a run keeps and the tokenizer of its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_klear.runs.report.runs import Run

MAX_PENDING = 8
"""Tokens that may share one character; past these the bytes are not text, and are shown as such."""


class Decoder(Protocol):
    """What is used of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


def open_tokenizer(run: Run) -> Decoder | None:
    """The tokenizer of the run's model, None where it is not there (any more)."""
    path = Path(str(run.settings.get("model.path", ""))) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        decoder: Decoder = Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing narrower for a file that it cannot read
        return None
    return decoder


def token_texts(tokenizer: Decoder, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character that several tokens share is given to the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        is_whole = not text.endswith("\ufffd") or len(pending) == MAX_PENDING
        texts.append(text if is_whole else "")
        pending = [] if is_whole else pending
    if pending:
        texts[-1] = tokenizer.decode(pending, skip_special_tokens=False)
    return texts
