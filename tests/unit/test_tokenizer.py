"""Conversations to tokens: what is trained is the assistant's text, to the letter."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.data.rows import DataError, read_row
from megatron_klear.data.template import ChatTemplate, MarkedText
from megatron_klear.data.tokenizer import ChatTokenizer, TokenizerSpec, load_spec, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_tokenizer"

HEADER = "{{ '<|im_start|>' + message.role + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for message in messages %}" + HEADER + "{{ message.content + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
STRIPPING = (  # like Qwen3's: thinking only in the last turn, an empty block where that has none
    "{% for message in messages %}" + HEADER + "{% set answer = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if message.role != 'assistant' %}{{ message.content }}"
    "{% elif not loop.last %}{{ answer }}"
    "{% elif '</think>' in message.content %}{{ message.content }}"
    "{% else %}{{ '<think>\\n\\n</think>\\n\\n' + answer }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
OPENING = (  # like R1's: the generation prompt opens the thinking, the template cuts it off everywhere
    "{% for message in messages %}"
    + HEADER
    + "{{ message.content.split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "stripping": STRIPPING, "opening": OPENING}


@pytest.fixture(scope="module")
def spec() -> TokenizerSpec:
    return load_spec(TINY)


@pytest.fixture(scope="module")
def tiny(spec: TokenizerSpec) -> ChatTokenizer:
    return ChatTokenizer(spec)


@pytest.fixture(scope="module")
def tokenizers(spec: TokenizerSpec) -> dict[str, ChatTokenizer]:
    templates = {"marked": spec.template, **TEMPLATES}
    return {name: ChatTokenizer(replace(spec, template=template)) for name, template in templates.items()}


def trained_texts(tokenizer: ChatTokenizer, messages: list[dict[str, object]], turns: str = "all") -> list[str]:
    """Decoded runs of trained tokens; fails where the tokens do not spell the rendered text."""
    row = read_row({"messages": messages})
    sample, marked = tokenizer.encode_row(row, turns), tokenizer.template.mark(row, turns)
    assert tokenizer.decode(sample.tokens) == marked.text
    assert len(sample.tokens) == len(sample.trained)
    texts = [marked.text[start:end] for start, end in marked.spans]
    assert tokenizer.decode(sample.tokens[sample.trained]) == "".join(texts)
    return texts


def conversation(*texts: str) -> list[dict[str, object]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "<" not in text and not any(mark in text for mark in "\ufdd0\ufdd1\ufdd2")
)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, thinking=TEXT, answer=TEXT, kind=st.sampled_from(["marked", "plain", "stripping"]))
def test_last_turn_is_trained_to_the_letter(
    tokenizers: dict[str, ChatTokenizer], prompt: str, thinking: str, answer: str, kind: str
) -> None:
    for content in (answer, f"<think>{thinking}</think>{answer}", f"<think>\n{thinking}\n</think>\n\n{answer}"):
        texts = trained_texts(tokenizers[kind], conversation("hello", "hi", prompt, content), "last")
        assert texts == [content + "<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(first=TEXT, prompt=TEXT, answer=TEXT, kind=st.sampled_from(["marked", "plain"]))
def test_every_turn_is_trained_to_the_letter(
    tokenizers: dict[str, ChatTokenizer], first: str, prompt: str, answer: str, kind: str
) -> None:
    messages = [{"role": "system", "content": "be brief"}, *conversation(prompt, first, "on", answer)]
    assert trained_texts(tokenizers[kind], messages) == [first + "<|im_end|>", answer + "<|im_end|>"]


def test_stripped_thinking_of_earlier_turns_is_neither_read_nor_trained(tokenizers: dict[str, ChatTokenizer]) -> None:
    messages = conversation("a", "<think>\nx\n</think>\n\nfirst", "b", "<think>\ny\n</think>\n\nsecond")
    texts = trained_texts(tokenizers["stripping"], messages)
    assert texts == ["first<|im_end|>", "<think>\ny\n</think>\n\nsecond<|im_end|>"]


def test_empty_thinking_from_the_template_is_read_but_not_trained(tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers["stripping"]
    marked = tokenizer.template.mark(read_row({"prompt": "q", "response": "answer"}), "all")
    assert marked.text.endswith("assistant\n<think>\n\n</think>\n\nanswer<|im_end|>")
    assert [marked.text[a:b] for a, b in marked.spans] == ["answer<|im_end|>"]


@pytest.mark.parametrize(
    ("response", "text", "trained"),
    [
        ("<think>\nwhy\n</think>\nso", "<think>\nwhy\n</think>\nso<|im_end|>", "why\n</think>\nso<|im_end|>"),
        ("<think>why</think>so", "<think>why</think>so<|im_end|>", "why</think>so<|im_end|>"),
        ("why\n</think>\nso", "<think>\nwhy\n</think>\nso<|im_end|>", "why\n</think>\nso<|im_end|>"),
        ("so", "so<|im_end|>", "so<|im_end|>"),
    ],
)
def test_thinking_opened_by_the_prompt_is_not_doubled(
    tokenizers: dict[str, ChatTokenizer], response: str, text: str, trained: str
) -> None:
    marked = tokenizers["opening"].template.mark(read_row({"prompt": "q", "response": response}), "all")
    assert marked.text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + text
    assert [marked.text[a:b] for a, b in marked.spans] == [trained]


def test_messages_after_the_last_assistant_turn_change_nothing(tiny: ChatTokenizer) -> None:
    base = conversation("q", "a")
    longer = tiny.encode_row(read_row({"messages": [*base, {"role": "user", "content": "thanks"}]}))
    assert np.array_equal(longer.tokens, tiny.encode_row(read_row({"messages": base})).tokens)


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "q"}], conversation("q", "  ")])
def test_rows_without_assistant_text_train_nothing(tiny: ChatTokenizer, messages: list[dict[str, object]]) -> None:
    assert not tiny.encode_row(read_row({"messages": messages})).trained.any()


def test_prompt_and_response_rows_equal_messages(tiny: ChatTokenizer) -> None:
    rows = (
        {"prompt": "q", "response": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "response": "a", "messages": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
    )
    first, *others = (tiny.encode_row(read_row(row)) for row in rows)
    for other in others:
        assert np.array_equal(first.tokens, other.tokens)
        assert np.array_equal(first.trained, other.trained)


def test_rollout_prompt_is_the_untrained_prefix(tokenizers: dict[str, ChatTokenizer]) -> None:
    for kind in ("marked", "plain"):
        sample = tokenizers[kind].encode_row(read_row({"prompt": "What is 2?", "response": "<think>\n2\n</think>\n2"}))
        prompt = tokenizers[kind].encode_prompt([{"role": "user", "content": "What is 2?"}])
        assert np.array_equal(sample.tokens[: len(prompt)], prompt)
        assert not sample.trained[: len(prompt)].any()
        assert sample.trained[len(prompt) :].all()


def test_mask_equals_that_of_transformers(tiny: ChatTokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TINY)
    for line in (ROOT / "examples" / "data" / "gsm8k_test_100.jsonl").read_text().splitlines()[:30]:
        row = json.loads(line)
        messages = [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        encoded = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        sample = tiny.encode_row(read_row(row))
        n = len(sample.tokens)
        assert sample.tokens.tolist() == encoded["input_ids"][:n]
        assert sample.trained.tolist() == [bool(on) for on in encoded["assistant_masks"][:n]]
        assert not any(encoded["assistant_masks"][n:])


def test_a_token_across_prompt_and_answer_is_split(tiny: ChatTokenizer) -> None:
    text = "x the answer"
    inside = text.index("answer") + 3
    assert any("answer" in tiny.decode([t]) for t in tiny.encode(text)), "the test needs a word that is one token"
    sample = tiny.encode_marked(MarkedText(text, ((inside, len(text)),)))
    assert tiny.decode(sample.tokens) == text
    assert tiny.decode(sample.tokens[sample.trained]) == text[inside:]


def test_tool_turns_are_trained_with_their_calls(spec: TokenizerSpec) -> None:
    call = "{% if message.tool_calls %}{{ '<call>' + message.tool_calls[0].name + '</call>' }}{% endif %}"
    template = PLAIN.replace(
        "{{ message.content + '<|im_end|>\\n' }}", "{{ message.content }}" + call + "{{ '<|im_end|>\\n' }}"
    )
    tokenizer = ChatTokenizer(replace(spec, template=template))
    asks = {"role": "assistant", "content": "look", "tool_calls": [{"name": "find"}]}
    silent = {"role": "assistant", "content": None, "tool_calls": [{"name": "go"}]}
    messages = [*conversation("q"), asks, {"role": "tool", "content": "r"}, silent]
    assert trained_texts(tokenizer, messages) == ["look<call>find</call><|im_end|>", "<call>go</call><|im_end|>"]


BAD_TEMPLATES = {
    "no stop token": (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}",
        "nothing to stop at",
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}",
        "leaves out",
    ),
    "other header": (PLAIN.replace("assistant\\n' }}{% endif", "bot\\n' }}{% endif"), "not a prefix"),
    "content lost": (PLAIN.replace("message.content", "''"), "not a prefix"),
    "does not compile": ("{% for %}", "does not compile"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "clock": ("{{ strftime_now('%Y') }}" + PLAIN, "strftime_now"),
    "marks elsewhere": ("{% generation %}x{% endgeneration %}" + PLAIN, "does not keep"),
    "reasoning cut in a marked turn": (
        PLAIN.replace("{{ message.content", "{% generation %}{{ message.content.split('</think>')[-1]").replace(
            "<|im_end|>\\n' }}", "<|im_end|>' }}{% endgeneration %}"
        ),
        "does not keep",
    ),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_templates_that_hide_the_assistant_are_refused(spec: TokenizerSpec, case: str) -> None:
    template, words = BAD_TEMPLATES[case]
    with pytest.raises(DataError, match=words):
        ChatTokenizer(replace(spec, template=template)).encode_row(
            read_row({"prompt": "q", "response": "<think>\nwhy\n</think>\n\na"})
        )


def test_separate_reasoning_that_a_template_drops_is_an_error(tokenizers: dict[str, ChatTokenizer]) -> None:
    row = {"messages": [*conversation("q"), {"role": "assistant", "content": "a", "reasoning_content": "why"}]}
    with pytest.raises(DataError, match="drops part of the last turn"):
        tokenizers["plain"].encode_row(read_row(row))
    assert "why" in tokenizers["marked"].template.mark(read_row(row), "all").text


def test_folders_without_tokenizer_or_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(DataError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"absent\.jinja does not exist"):
        load_tokenizer(tmp_path, tmp_path / "absent.jinja")
    (tmp_path / "chat.jinja").write_text(PLAIN)
    assert load_tokenizer(tmp_path, tmp_path / "chat.jinja").eos_token_id == 509
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path, tmp_path / "chat.jinja")


def test_lone_surrogates_are_refused(tiny: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tiny.encode_row(read_row({"prompt": "q", "response": "\ud800"}))


@pytest.fixture(scope="module")
def qwen(shared_data: Path) -> dict[str, ChatTokenizer]:
    folder = shared_data / "tokenizer_qwen3"
    return {"3": load_tokenizer(folder), "2.5": load_tokenizer(folder, folder / "qwen2.5_chat_template.jinja")}


def test_qwen_templates_on_real_long_chains_of_thought(qwen: dict[str, ChatTokenizer], shared_data: Path) -> None:
    marco = json.loads((shared_data / "long_cot" / "marco_o1_CoT_demo_125.json").read_text())[:40]
    deepseek = json.loads((shared_data / "long_cot" / "sample_openrouter_outputs.json").read_text())
    rows = [(row["instruction"], row["response"]) for row in marco]
    rows += [(r["problem"], f"<think>\n{r['message_thinking']}\n</think>\n\n{r['message_content']}") for r in deepseek]
    for tokenizer in qwen.values():
        for prompt, response in rows:
            assert trained_texts(tokenizer, conversation(prompt, response)) == [response + "<|im_end|>"]


def test_qwen3_strips_earlier_thinking_and_keeps_the_last(qwen: dict[str, ChatTokenizer]) -> None:
    messages = conversation("a", "<think>\nx\n</think>\n\nfirst", "b", "<think>y</think>second")
    assert trained_texts(qwen["3"], messages) == ["first<|im_end|>", "<think>y</think>second<|im_end|>"]
    assert trained_texts(qwen["2.5"], messages)[0] == "<think>\nx\n</think>\n\nfirst<|im_end|>"


def test_qwen3_renders_as_transformers_does(qwen: dict[str, ChatTokenizer], shared_data: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shared_data / "tokenizer_qwen3")
    tools = [{"type": "function", "function": {"name": "find", "description": "d <&> é", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": {"q": "é<"}}]}
    messages = [{"role": "system", "content": "s"}, *conversation("q"), call, {"role": "tool", "content": "r"}]
    for prompt in (True, False):
        ours = qwen["3"].template.render(messages, tools, generation_prompt=prompt)
        assert ours == theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)


def test_qwen3_tool_conversation(qwen: dict[str, ChatTokenizer]) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": {"q": "x"}}]}
    messages = [*conversation("q"), call, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "done"}]
    texts = trained_texts(qwen["3"], messages)
    assert texts == ['<tool_call>\n{"name": "find", "arguments": {"q": "x"}}\n</tool_call><|im_end|>', "done<|im_end|>"]


def test_compiled_template_needs_no_tokenizer() -> None:
    template = ChatTemplate(PLAIN, {}, ["<|im_end|>"], "a template")
    assert template.render(conversation("q"), generation_prompt=True).endswith("<|im_start|>assistant\n")
