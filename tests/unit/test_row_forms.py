"""Rows mean the same from JSONL and Parquet, whatever keys other rows and other programs put beside them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data.rows import DataError, read_row
from megatron_klear.data.sources import parse_chunk, read_chunks
from megatron_klear.data.template import ChatTemplate

PROMPT = "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
PLAIN = "{%- for m in messages %}{{- '<' + m.role + '>' + m.content + '<end>' }}{%- endfor %}" + PROMPT
TRIMS = "{%- for m in messages %}{{- '<' + m.role + '>' + m.content | trim + '<end>' }}{%- endfor %}" + PROMPT
CUTS_THINKING = (
    "{%- for m in messages %}{{- '<' + m.role + '>' + m.content.split('</think>')[-1] + '<end>' }}{%- endfor %}"
    + PROMPT
)
FIRST_MESSAGE = (  # like Qwen's: looks for a system message
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}" + PLAIN
)
PREFILLS = (  # opens the thinking in the generation prompt, and leaves it in all turns
    "{%- for m in messages %}{{- '<' + m.role + '>' + m.content + '<end>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant><think>\\n' }}{%- endif %}"
)
TOOLS = (
    "{%- if tools %}{{- tools | tojson + '<end>' }}{%- endif %}{%- for m in messages %}{{- '<' + m.role + '>' }}"
    "{%- if m.role == 'assistant' %}{%- generation %}{{- m.content }}{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}{%- endfor %}{{- '<end>' }}"
    "{%- endgeneration %}{%- else %}{{- m.content + '<end>' }}{%- endif %}{%- endfor %}" + PROMPT
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, ["<end>"], "the template")


def trained(source: str, messages: list[dict[str, Any]], turns: Any = "all", **row: Any) -> list[str]:
    """The trained texts of a conversation."""
    marked = template(source).mark(read_row({"messages": messages, **row}), turns)
    return [marked.text[start:end] for start, end in marked.spans]


def chat(*contents: str) -> list[dict[str, Any]]:
    """A question, an answer, and so on."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def both_forms(folder: Path, rows: list[dict[str, Any]]) -> list[list[tuple[str, tuple[tuple[int, int], ...]]]]:
    """What is read and trained of rows in a JSONL file, and in a Parquet file with one type for all of them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        parsed = [row for chunk in read_chunks(folder / name) for _, row in parse_chunk(chunk)]
        marked = [template(TOOLS).mark(row, "all") for row in parsed]
        found.append([(of.text, of.spans) for of in marked])
    return found


def call(name: str, arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    """A conversation in which the assistant calls a tool."""
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [function]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
    }


def test_keys_of_other_rows_reach_neither_tools_nor_arguments(tmp_path: Path) -> None:
    rows = [
        call("weather", {"city": "Oslo"}, {"city": {"type": "string"}}),
        call("add", {"a": 2, "b": 3}, {"a": {"type": "integer"}, "b": {"type": "integer"}}),
    ]
    jsonl, parquet = both_forms(tmp_path, rows)
    assert jsonl == parquet
    texts = [text[start:end] for text, spans in parquet for start, end in spans]
    assert texts == ['<call>weather {"city": "Oslo"}<end>', '<call>add {"a": 2, "b": 3}<end>']
    assert "null" not in parquet[0][0]


NAMES = st.sampled_from("abcdef")
LEAVES = st.one_of(st.integers(-5, 5), st.just(None))
OBJECTS = st.recursive(
    st.dictionaries(NAMES, LEAVES, min_size=1, max_size=3),
    lambda inner: st.dictionaries(NAMES, inner | st.lists(inner, min_size=1, max_size=2), min_size=1, max_size=3),
    max_leaves=6,
)


def _sorted(value: Any) -> Any:
    """Keys in one order: a Parquet column has one for all of its rows, and no other can be told from it."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(OBJECTS, OBJECTS), min_size=1, max_size=4))
def test_any_nesting_reads_the_same_from_both_forms(tmp_path_factory: pytest.TempPathFactory, pairs: Any) -> None:
    rows = [_sorted(call("tool", arguments, properties)) for arguments, properties in pairs]
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return  # no Arrow type holds these rows together, so there is no such Parquet file
    if "struct<>" in str(table.schema):
        return  # which Parquet cannot write
    ordered = table.to_pylist()
    jsonl, parquet = both_forms(tmp_path_factory.mktemp("rows"), [_sorted(row) for row in ordered])
    assert jsonl == parquet
    assert [read_row(row).tools for row in rows] == [read_row(row).tools for row in ordered]


def test_arguments_as_json_text_are_objects_and_keep_their_nulls() -> None:
    function = {"name": "find", "arguments": '{"city": null, "n": 2}'}
    messages = [*chat("go"), {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
    assert trained(TOOLS, messages) == ['<call>find {"city": null, "n": 2}<end>']
    function["arguments"] = {"city": None, "n": 2}
    assert trained(TOOLS, messages) == ['<call>find {"n": 2}<end>']
    for broken in ('{"city": ', "[1, 2]"):
        function["arguments"] = broken
        with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[0\].*arguments"):
            read_row({"messages": messages})


@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train"])
@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
@pytest.mark.parametrize("source", [PLAIN, TOOLS], ids=["by prefix", "by blocks"])
def test_turns_that_a_row_takes_out_of_the_loss_are_not_trained(key: str, off: Any, on: Any, source: str) -> None:
    messages = chat("q", "BAD", "again", "GOOD", "more", "FINE")
    for index, value in ((1, off), (3, on)):
        messages[index][key] = value
    assert trained(source, messages) == ["GOOD<end>", "FINE<end>"]
    messages[5][key] = off
    assert trained(source, messages) == ["GOOD<end>"]
    assert trained(source, messages, "last") == []
    messages[3][key] = off
    assert trained(source, messages) == []


def test_weights_between_and_contradictions_are_refused() -> None:
    for changes, words in (({"weight": 0.5}, "0.5"), ({"train": "no"}, "'no'"), ({"weight": 0, "loss": True}, "both")):
        messages = chat("q", "a")
        messages[1] |= changes
        with pytest.raises(DataError, match=rf"messages\[1\].*{words}"):
            read_row({"messages": messages})


@pytest.mark.parametrize("extra", [{"info": {"source": "x"}}, {"weight": 1}, {"id": 7}, {"name": "ann"}])
@pytest.mark.parametrize("source", [CUTS_THINKING, TRIMS], ids=["cuts thinking", "trims"])
def test_unknown_keys_leave_the_last_answer_to_the_letter(source: str, extra: dict[str, Any]) -> None:
    answer = "<think>\nwhy\n</think>\n\n5\n"
    messages = chat("2+3", answer)
    messages[1] |= extra
    assert trained(source, messages) == [answer + "<end>"]


def test_templates_see_no_unknown_key() -> None:
    tells = "{%- for m in messages %}{{- m | tojson + '<end>' }}{%- endfor %}" + PROMPT
    messages = chat("q", "a", "q")
    messages[0] |= {"id": 1, "weight": 1}
    seen = template(tells).render(read_row({"messages": messages}).messages)
    assert "id" not in seen
    assert "weight" not in seen


@pytest.mark.parametrize("source", [PLAIN, FIRST_MESSAGE, PREFILLS], ids=["plain", "first message", "prefills"])
def test_conversations_may_open_with_the_assistant(source: str) -> None:
    messages = [{"role": "assistant", "content": "Hello, what is it?"}, *chat("2+2", "4")]
    assert trained(source, messages, "all") == ["Hello, what is it?<end>", "4<end>"]
    assert trained(source, messages, "last") == ["4<end>"]
    assert trained(source, messages[:1]) == ["Hello, what is it?<end>"]


@pytest.mark.parametrize("think", ["<think>\nwhy\n</think>\n\n", "<think>why</think>", "\n<think>why</think>", ""])
def test_a_prefilled_think_is_trained_in_no_turn(think: str) -> None:
    first, second = trained(PREFILLS, chat("q", think + "5", "q", think + "5"))
    assert first == second
    assert "<think>" not in first
    assert first.endswith("5<end>")


@pytest.mark.parametrize(
    "arguments", ["tool['function']['arguments']", "tool.function.arguments", 'tool["function"]["arguments"]']
)
def test_templates_that_join_arguments_as_text_get_json(arguments: str) -> None:
    joins = (  # like R1's
        "{%- for m in messages %}{{- '<' + m.role + '>' + m.content }}{%- for tool in m.tool_calls or [] %}"
        "{{- '<call>' + tool['function']['name'] + '\\n' + " + arguments + " + '\\n' }}{%- endfor %}{{- '<end>' }}"
        "{%- endfor %}" + PROMPT
    )
    for written in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        row = call("find", {"city": "Oslo"}, {"city": {"type": "string"}})
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = written
        assert trained(joins, row["messages"]) == ['<call>find\n{"city": "Oslo"}\n<end>']
