"""Chat templates: the text of a conversation, and which part of it the assistant wrote.

A template with `{% generation %}` blocks says itself what the assistant writes, and is followed. For any other one:

- The last turn is the generation prompt, then the row's text to the letter, then the template's end of turn. What the
  template would do to that text (Qwen3 moves line breaks around `</think>`, R1's template cuts the thinking off) never
  reaches it. Where the row has no thinking and the template puts an empty `<think></think>` before the answer, as
  Qwen3's does, that block stands in the text untrained. Where the generation prompt itself opens `<think>`, the tag is
  prompt and not trained.
- Earlier turns are as the template renders them: Qwen3's strips their thinking, as it does at inference.

A turn with tool calls or separate `reasoning_content` has no text of its own, so there the template's rendering stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megatron_klear.data.rows import RESERVED, ChatRow, DataError, Message, is_plain

Turns = Literal["all", "last"]

_START, _END, _PLACEHOLDER = RESERVED
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_JOINED_ARGUMENTS = re.compile(
    r"""[+~]\s*\w+\s*(\[\s*['"]function['"]\s*\]|\.function)\s*(\[\s*['"]arguments['"]\s*\]|\.arguments)(?!\s*\|)"""
)
"""A template that joins a call's arguments to other text, as R1's does, wants them as JSON text."""
_OPEN_THINK = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered conversation, cut after its last trained character, and the trained [start, end) of it."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` wraps what it renders in marks, which survive macros and filters, unlike positions."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}"


class ChatTemplate:
    """A compiled chat template of one tokenizer.

    `special_tokens` are the names a template may use (`bos_token`, ...), `stop_tokens` the texts of special tokens,
    among which the end of an assistant turn is sought. There is no clock in it: a template that prints today's date
    (`strftime_now`) takes its fixed date where it has one and is an error otherwise.
    Raises DataError where the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], stop_tokens: Sequence[str], name: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{name} does not compile: {error}") from None
        self.name = name
        self.has_marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self.joins_arguments = _JOINED_ARGUMENTS.search(source) is not None
        self._special_tokens = dict(special_tokens)
        texts = sorted((token for token in stop_tokens if token.strip()), key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        generation_prompt: bool = False,
        thinking: bool | None = None,
    ) -> str:
        """The text of `messages`, with the header of an assistant turn to come where `generation_prompt` is true.

        `thinking` is what the template knows as `enable_thinking`; None leaves it to the template.
        Raises DataError with the template's own words where it refuses them.
        """
        marked = self._render(messages, tools, generation_prompt=generation_prompt, thinking=thinking)
        return marked.replace(_START, "").replace(_END, "")

    def mark(self, row: ChatRow, turns: Turns) -> MarkedText:
        """Render a row and find what the assistant wrote, in `all` its turns or the `last`.

        Raises DataError where that cannot be told exactly.
        """
        messages = row.through_last_assistant(of_all=turns == "all")
        if not messages:
            return MarkedText("", ())
        if self.has_marks:
            return self._mark_by_blocks(messages, row, turns)
        return self._mark_by_prefix(messages, row, turns)

    def turn_end(self) -> tuple[str, bool] | None:
        """What closes an assistant turn, through its stop token, and whether training a turn trains it.

        It is not trained where a `{% generation %}` block leaves it out. None where the template writes nothing to stop
        at, or refuses a plain question and answer.
        """
        question = {"role": "user", "content": "?"}
        try:
            text = self._render([question, {"role": "assistant", "content": _PLACEHOLDER}], ())
            after = text.partition(_PLACEHOLDER)[2]
            ending = self._ending(after.replace(_START, "").replace(_END, ""))
        except DataError:
            return None
        if text.count(_PLACEHOLDER) != 1:
            return None
        return ending, not self.has_marks or ending in after.partition(_END)[0]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        generation_prompt: bool = False,
        thinking: bool | None = None,
    ) -> str:
        flags = {} if thinking is None else {"enable_thinking": thinking}
        if self.joins_arguments:
            messages = [_with_arguments_as_text(message) for message in messages]
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
                **flags,
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise DataError(
                f"{self.name} refuses the conversation: {error}; leave out what it does not know, or use another "
                "template (data.chat_template)"
            ) from None

    def _mark_by_blocks(self, messages: Sequence[Message], row: ChatRow, turns: Turns) -> MarkedText:
        tools = row.tools

        def blocks_before(count: int) -> int:
            return self._render(messages[:count], tools).count(_START) if count else 0

        text, spans = _strip_marks(self._render(messages, tools))
        earlier = blocks_before(len(messages) - 1)
        last = "".join(text[start:end] for start, end in spans[earlier:])
        left_out = {
            block
            for index in row.untrained
            if index < len(messages)
            for block in range(blocks_before(index), blocks_before(index + 1))
        }
        first = earlier if turns == "last" else 0
        spans = [span for block, span in enumerate(spans) if block >= first and block not in left_out]
        for piece in _pieces(messages[-1]):
            if piece not in last:
                raise DataError(
                    f"{self.name} does not keep the last turn's text inside its generation block (lost: "
                    f"{piece[:60]!r}); use a template that keeps it, data.chat_template"
                )
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            raise DataError(f"{self.name} has generation blocks, but none around the assistant's turns; mend it")
        return MarkedText(text[: spans[-1][1]], tuple(spans))

    def _mark_by_prefix(self, messages: Sequence[Message], row: ChatRow, turns: Turns) -> MarkedText:
        context, last, tools = messages[:-1], messages[-1], row.tools
        probe = self.render([*context, {"role": "assistant", "content": _PLACEHOLDER}], tools)
        # Many templates look at their first message, so there is no prompt of no messages to be had.
        prompt = self.render(context, tools, generation_prompt=True) if context else probe.partition(_PLACEHOLDER)[0]
        head, opened = _split_open_think(prompt)
        before, _, after = probe[len(head) :].partition(_PLACEHOLDER)
        if not probe.startswith(head) or probe.count(_PLACEHOLDER) != 1:
            raise self._not_a_prefix("the generation prompt is not a prefix of the conversation it opens")
        if before.strip() and not _EMPTY_THINK.fullmatch(before):
            raise self._not_a_prefix(f"the generation prompt leaves out {before[:60]!r} of the assistant's turn")
        ending = self._ending(after)
        plain = is_plain(last)
        body = last["content"] if plain else self._rendered_body(messages, tools, head, after)
        prefix, body, start = _open_turn(head, opened, before, body, rendered=not plain)
        text = prefix + body + ending
        spans = [(start, len(text))]
        if turns == "all":
            spans = [*self._earlier_spans(context, row, prompt, ending), *spans]
        return MarkedText(text, tuple(spans))

    def _rendered_body(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], head: str, after: str
    ) -> str:
        """The last turn as the template writes it, for turns with reasoning or tool calls beside the text."""
        full = self.render(messages, tools)
        if not full.startswith(head) or not full.endswith(after) or len(full) < len(head) + len(after):
            raise self._not_a_prefix("the generation prompt is not a prefix of the conversation it opens")
        body = full[len(head) : len(full) - len(after)]
        for piece in _pieces(messages[-1]):
            if piece not in body:
                raise DataError(
                    f"{self.name} drops part of the last turn ({piece[:60]!r}); put `reasoning_content` into `content` "
                    "as <think>...</think>, or use another template (data.chat_template)"
                )
        return body

    def _ending(self, after: str) -> str:
        """What closes an assistant turn, through its stop token; line breaks after it are not the assistant's."""
        stop = self._stop.search(after) if self._stop else None
        ending = after[: stop.end()] if stop else after.rstrip()
        if not ending.strip():
            raise DataError(
                f"{self.name} ends an assistant turn with nothing to stop at, so a model would never learn to stop; "
                "use a template that writes an end-of-turn token, data.chat_template"
            )
        return ending

    def _earlier_spans(
        self, context: Sequence[Message], row: ChatRow, prompt: str, ending: str
    ) -> list[tuple[int, int]]:
        """Spans of the trained assistant turns inside `prompt`, the rendering of `context`.

        A turn starts where the generation prompt after the messages before it ends. To find where its text ends, the
        text is replaced and both renderings are compared from behind: what follows is the same in both.
        """
        spans = []
        for index, message in enumerate(context):
            if message["role"] != "assistant" or index in row.untrained:
                continue
            probe = None
            if message["content"]:
                replaced = [*context[:index], {**message, "content": _PLACEHOLDER}, *context[index + 1 :]]
                probe = self.render(replaced, row.tools, generation_prompt=True)
            start, opened = self._turn_start(context[:index], row.tools, prompt, probe, index)
            text_end = start = start + _prompted_think(opened, prompt[start:])
            if probe is not None:
                after = probe.partition(_PLACEHOLDER)[2]
                if probe.count(_PLACEHOLDER) != 1 or not prompt.endswith(after):
                    raise self._not_a_prefix(f"the end of message {index} cannot be told")
                text_end = len(prompt) - len(after)
            empty_think = _EMPTY_THINK.match(prompt, start, max(text_end, start))
            start = empty_think.end() if empty_think else start
            end = prompt.find(ending, text_end)
            if end < 0 or text_end < start or (end > text_end and "tool_calls" not in message):
                raise self._not_a_prefix(f"the end of message {index} cannot be told")
            if end > start:
                spans.append((start, end + len(ending)))
        return spans

    def _turn_start(
        self,
        before: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        prompt: str,
        probe: str | None,
        index: int,
    ) -> tuple[int, str]:
        """Where in `prompt` the assistant turn after the messages `before` starts, and the <think> that opens it.

        For a conversation's first message it is told from `probe`, the rendering with a mark for its text.
        """
        if before:
            head, opened = _split_open_think(self.render(before, tools, generation_prompt=True))
        elif probe is not None:
            head, opened = _split_open_think(probe.partition(_PLACEHOLDER)[0])
        else:
            raise self._not_a_prefix("the conversation opens with an assistant's turn that has no text")
        if not prompt.startswith(head):
            raise self._not_a_prefix(f"message {index} is rendered differently as the last and as an earlier one")
        return len(head), opened

    def _not_a_prefix(self, what: str) -> DataError:
        return DataError(
            f"{self.name}: {what}, so the assistant's text cannot be told from the prompt; mark it with "
            '{% generation %} in a template of your own (data.chat_template), or set data.trained_turns = "last"'
        )


def _with_arguments_as_text(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            call = {**call, "function": {**function, "arguments": _tojson(function["arguments"])}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _open_turn(head: str, opened: str, before: str, body: str, *, rendered: bool) -> tuple[str, str, int]:
    """Join the prompt and the last turn: the text before the body, the body, and where training starts.

    `opened` is the <think> that ends the generation prompt, `before` what the template writes before a plain answer.
    """
    if rendered and before and body.startswith(before):
        return head + before, body[len(before) :], len(head + before)
    if "<think>" not in body:
        prefix = head + (opened if "</think>" in body else before)
        return prefix, body, len(prefix)
    return head, body, len(head) + _prompted_think(opened, body)


def _prompted_think(opened: str, text: str) -> int:
    """How much of a turn's text is the <think> that the generation prompt gives already, and so is not trained."""
    if not opened:
        return 0
    own = re.match(r"\s*<think>", text)
    return len(opened) if text.startswith(opened) else own.end() if own else 0


def _split_open_think(prompt: str) -> tuple[str, str]:
    """A generation prompt without and with only the `<think>` that it may end with."""
    opened = _OPEN_THINK.search(prompt)
    return (prompt[: opened.start()], opened.group()) if opened else (prompt, "")


def _strip_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove generation marks; spans are those of the text without them."""
    spans, parts, length = [], [], 0
    for index, part in enumerate(marked.split(_START)):
        inside, _, outside = part.partition(_END) if index else ("", "", part)
        if inside:
            spans.append((length, length + len(inside)))
        elif index:
            spans.append((length, length))
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(parts), spans


def _pieces(message: Message) -> list[str]:
    """What must come through a template: the thinking and the answer, each without the white space around it."""
    text = message.get("reasoning_content", "") + "</think>" + message["content"]
    return [piece.strip() for piece in re.split(r"</?think>", text) if piece.strip()]


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """`tojson` as chat templates expect it, without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
