"""Text to tokens: a model folder's tokenizer.json, through its chat template, with what the assistant wrote marked.

It needs only the light `tokenizers` package, so that worker processes start in a fraction of a second and import no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_klear.data.rows import ChatRow, DataError, Message
from megatron_klear.models.stop_tokens import NamedToken

from ..types import Sample
from .template import ChatTemplate, MarkedText, Turns
from .tokenizer_files import (
    check_agreement,
    check_tokenizer_folder,
    read_backend,
    read_settings,
    read_template,
    special_tokens,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec:
    """All that tokenizing needs, as plain data that is quick to send to another process."""

    folder: str
    backend: str
    """The fast tokenizer in the form of tokenizer.json."""
    special_tokens: dict[str, str]
    """`eos_token` and its like, as templates name them."""
    template: str
    template_name: str
    """What to call the template in errors."""


class ChatTokenizer:
    """Encodes conversations; made by `load_tokenizer`, or from a spec in a worker process."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._backend = tokenizers.Tokenizer.from_str(spec.backend)
        special = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        stops = dict.fromkeys([*special, *(spec.special_tokens[k] for k in ("eos_token",) if k in spec.special_tokens)])
        self.template = ChatTemplate(spec.template, spec.special_tokens, list(stops), spec.template_name)

    @property
    def vocab_size(self) -> int:
        """One above the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """Id of `eos_token`, None where the tokenizer names none."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of `pad_token`, None where the tokenizer names none."""
        return self._special_id("pad_token")

    @property
    def eos(self) -> NamedToken | None:
        """`eos_token`, None where the tokenizer names none or its vocabulary lacks it."""
        token_id = self.eos_token_id
        return None if token_id is None else NamedToken(token_id, self.spec.special_tokens["eos_token"])

    @property
    def turn_end(self) -> NamedToken | None:
        """The token that ends an assistant turn in the chat template, which `encode_row` trains.

        None where a turn ends in ordinary text: a token of it may stand anywhere in an answer.
        """
        found = self.template.turn_end()
        if found is None:
            return None
        last = int(self.encode(found[0])[-1])
        if last not in self._backend.get_added_tokens_decoder() and last != self.eos_token_id:
            return None
        return NamedToken(last, self.decode([last]))

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its text, such as `</think>`; None where the vocabulary lacks it."""
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Tokens [n] of a text as it stands: no template, no special token added."""
        return np.array(self._encode(text).ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int32], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens [n]."""
        return str(self._backend.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens))

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> npt.NDArray[np.int32]:
        """Tokens [n] of messages and the header of the assistant turn to come: what a rollout starts from."""
        return self.encode(self.template.render(messages, tools, generation_prompt=True))

    def encode_row(self, row: ChatRow, turns: Turns = "all") -> Sample:
        """Tokens of a conversation, trained where the assistant wrote them, its end-of-turn token included.

        The first token is never trained: nothing predicts it. A row without assistant text gives an empty sample.
        Raises DataError where the template or the tokenizer cannot tell the assistant's text from the rest.
        """
        return self.encode_marked(self.template.mark(row, turns))

    def encode_marked(self, marked: MarkedText) -> Sample:
        """Tokens of a text with trained spans; no token lies across the bound of a span."""
        bounds = sorted({bound for span in marked.spans for bound in span if 0 < bound < len(marked.text)})
        tokens, offsets = self._tokens_and_offsets(marked.text)
        astride = [b for b in bounds if bool(np.any((offsets[:, 0] < b) & (b < offsets[:, 1])))]
        if astride:
            tokens, offsets = self._encode_apart(marked.text, astride, tokens)
        trained = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in marked.spans:
            trained |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
        trained[:1] = False
        return Sample(tokens=tokens, trained=trained)

    def _encode_apart(
        self, text: str, bounds: Sequence[int], together: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode the pieces between `bounds` one by one, as a prompt and its answer are at inference."""
        edges = [0, *bounds, len(text)]
        pieces = [self._tokens_and_offsets(text[a:b]) for a, b in pairwise(edges)]
        tokens = np.concatenate([tokens for tokens, _ in pieces])
        if self.decode(tokens) != self.decode(together):
            near = text[max(0, bounds[0] - 20) : bounds[0] + 20]
            raise DataError(f"the tokenizer of {self.spec.folder} joins prompt and answer into one token at {near!r}")
        return tokens, np.concatenate([at + edge for (_, at), edge in zip(pieces, edges, strict=False)])

    def _tokens_and_offsets(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int32), offsets

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise DataError("the text is not valid Unicode (a lone surrogate such as \\ud800); remove it") from None

    def _special_id(self, name: str) -> int | None:
        token = self.spec.special_tokens.get(name)
        return None if token is None else self.token_id(token)


def load_tokenizer(folder: Path, chat_template: Path | None = None) -> ChatTokenizer:
    """Load the tokenizer of a model folder; `chat_template` is a Jinja file to use instead of its own template.

    Tokens are those of tokenizer.json, whatever class tokenizer_config.json names. Raises DataError where the folder
    has no tokenizer.json or other files that contradict it, or where neither it nor `chat_template` has a template.
    """
    return ChatTokenizer(load_spec(folder, chat_template))


def load_spec(folder: Path, chat_template: Path | None = None) -> TokenizerSpec:
    """Read a tokenizer folder; see `load_tokenizer`."""
    check_tokenizer_folder(folder, chat_template)
    backend, settings = read_backend(folder), read_settings(folder)
    if chat_template is not None:
        template, name = chat_template.read_text(encoding="utf-8"), f"the chat template {chat_template}"
    else:
        template, name = read_template(folder, settings), f"the chat template of {folder}"
    check_agreement(backend, folder, settings, template)
    state = json.loads(backend.to_str())
    # Post-processors add special tokens, which templates write themselves, and trim white space off the offsets.
    state |= {"post_processor": None, "truncation": None, "padding": None}
    return TokenizerSpec(
        folder=str(folder),
        backend=json.dumps(state, ensure_ascii=False),
        special_tokens=special_tokens(settings, folder),
        template=template,
        template_name=name,
    )
