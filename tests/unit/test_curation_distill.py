"""Distillation from a teacher that is slow, refuses, breaks off and is paid: every response once, within the limit."""

import json
import os

import pytest
from curation_rows import contents, curate, problem, read, write
from teacher import PROMPT_TOKENS, answer_to, curate_until

from megatron_klear.curation.distill import with_thinking_opened
from megatron_klear.curation.lines import LineFile, StoreError
from megatron_klear.curation.spending import SpendLimitError
from megatron_klear.data.rows import DataError, read_row
from megatron_klear.evaluation import chat_api
from megatron_klear.evaluation.chat_api import EndpointError

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]}
ANSWERED = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "5"}]}
OPEN = {"messages": [*ANSWERED["messages"], {"role": "user", "content": "And 3 + 3?"}]}
TEXTS = [f"Problem {k}" for k in range(6)]
MAX_TOKENS = 20
PRICES = {"input_price": 1e6, "output_price": 2e6}  # one for a token of a prompt, two for one of an answer


def distill(teacher, rows, output, *arguments, samples=3, **endpoint):
    return curate(*arguments_of(teacher, rows, output, *arguments, samples=samples, **endpoint))


def arguments_of(teacher, rows, output, *arguments, samples=3, **endpoint):
    given = ["distill", "--input", rows, "--output", output, "--samples", samples]
    return [*given, "--sampling.max-tokens", MAX_TOKENS, *teacher.flags(**endpoint), *arguments]


def files_but_the_store(folder):
    return {name: content for name, content in contents(folder).items() if name != "responses.jsonl"}


def cost(tokens):
    return tokens[0] + 2 * tokens[1]


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", *map(problem, TEXTS))


def test_responses_are_rows_for_sft_with_where_they_are_from(tmp_path, teacher):
    rl = {**problem("Problem 1"), "extra_info": {"split": "train"}}
    rows = write(tmp_path / "rows.jsonl", rl, ANSWERED, {"prompt": "Hi", "response": "Ho"}, OPEN)
    output = tmp_path / "out" / "rows.jsonl"
    report = distill(teacher, rows, output)
    made = read(output)
    assert report["counts"] == {"rows": 12, "kept": 12, "dropped": 0, "bad": 0}
    assert [row["sample"] for row in made] == [0, 1, 2] * 4
    for row, source in zip(made, [rl] * 3 + [ANSWERED] * 3 + [None] * 3 + [OPEN] * 3, strict=True):
        prompt, answer = row["messages"][:-1], row["messages"][-1]
        assert answer["content"].startswith("<think>\nSeed ")
        assert read_row(row).through_last_assistant()[-1]["role"] == "assistant"
        assert (row["teacher"], row["finish"]) == ("teacher", "stop")
        if source is rl:
            assert prompt == [{"role": "user", "content": "Problem 1"}]
            assert {name: row[name] for name in rl if name != "prompt"} == {k: rl[k] for k in rl if k != "prompt"}
        elif source is ANSWERED:
            assert prompt == CHAT["messages"]
        elif source is OPEN:
            assert prompt == OPEN["messages"]
    seeds = [row["messages"][-1]["content"] for row in made]
    assert len(set(seeds)) == 12
    assert teacher.url not in (output.parent / "manifest.json").read_text()


@pytest.mark.parametrize("concurrency", [1, 8])
def test_whatever_fails_every_response_is_there_once_and_the_files_are_the_same(tmp_path, teacher, rows, concurrency):
    distill(teacher, rows, tmp_path / "calm" / "rows.jsonl")
    assert set(teacher.asked.values()) == {1}
    calm = dict(teacher.answered)
    teacher.asked.clear(), teacher.answered.clear()
    teacher.faults = {0: 429, 2: 500, 4: "break", 6: "cut", 9: "slow", 11: 408, 13: 503}
    output = tmp_path / "stormy" / "rows.jsonl"
    distill(teacher, rows, output, concurrency=concurrency, attempts=8)
    assert files_but_the_store(output.parent) == files_but_the_store(tmp_path / "calm")
    assert teacher.answered.keys() == calm.keys()
    lines = [line for line in read(output.parent / "responses.jsonl") if "key" in line]
    assert len(lines) == len({line["key"] for line in lines}) == 18


def test_answers_that_are_none_to_train_on_are_counted_and_not_asked_for_again(tmp_path, teacher):
    texts = ["Problem 1", "a forbidden one", "a filtered one", "a silent one", "a long one"]
    rows = write(tmp_path / "rows.jsonl", *map(problem, texts))
    output = tmp_path / "out" / "rows.jsonl"
    report = distill(teacher, rows, output, samples=2)
    assert report["dropped"] == {"empty": 2, "refused": 4, "truncated": 2}
    assert report["finishes"] == {"content_filter": 2, "length": 2, "refused": 2, "stop": 4}
    assert report["examples"]["refused"][0] == {
        "file": str(rows), "row": 2, "sample": 0, "why": "status 400: not such prompts"
    }  # fmt: skip
    assert len(read(output)) == 2
    asked = teacher.asked.total()
    kept = distill(teacher, rows, output, "--keep-truncated", "--force", samples=2)
    assert teacher.asked.total() == asked == 10
    assert kept["counts"]["kept"] == 4
    assert [row["finish"] for row in read(output)] == ["stop", "stop", "length", "length"]
    more = distill(teacher, rows, output, "--force", samples=3)
    assert teacher.asked.total() == asked + 5
    assert more["counts"]["rows"] == 15


def test_a_teacher_that_refuses_everything_has_refused_no_prompt(tmp_path, teacher):
    rows = write(tmp_path / "rows.jsonl", *(problem(f"forbidden {k}") for k in range(30)))
    for number, further in enumerate([{}, {"max_refused": 5}]):
        output = tmp_path / str(number) / "rows.jsonl"
        teacher.asked.clear()
        with pytest.raises(EndpointError, match=r"requests are refused and nothing .* status 400: not such prompts"):
            distill(teacher, rows, output, **further)
        assert not [line for line in read(output.with_name("responses.jsonl")) if "key" in line]
        assert teacher.asked.total() == 90 if not further else teacher.asked.total() < 30
    teacher.faults = dict.fromkeys(range(1000), 401)
    with pytest.raises(EndpointError, match="status 401"):
        distill(teacher, write(tmp_path / "other.jsonl", problem("x")), tmp_path / "key" / "rows.jsonl")


def test_a_key_that_ends_in_between_refuses_no_prompt(tmp_path, teacher, rows):
    output = tmp_path / "out" / "rows.jsonl"
    teacher.faults = dict.fromkeys(range(7, 1000), 403)
    with pytest.raises(EndpointError, match=r"nothing is answered in between, .* status 403: not now"):
        distill(teacher, rows, output, concurrency=1, max_refused=2)
    with pytest.raises(EndpointError, match=r"nothing is answered in between, .* status 403: not now"):
        distill(teacher, rows, output, concurrency=1)
    assert len([line for line in read(output.with_name("responses.jsonl")) if "key" in line]) == 7
    teacher.faults = {}
    assert distill(teacher, rows, output)["finishes"] == {"stop": 18}


def test_equal_prompts_share_their_responses(tmp_path, teacher):
    rows = write(tmp_path / "rows.jsonl", problem("Problem 1"), problem("Problem 1"))
    report = distill(teacher, rows, tmp_path / "out" / "rows.jsonl")
    assert report["counts"]["kept"] == 6
    assert teacher.asked.total() == 3


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_limit_on_spending_is_kept_and_can_be_raised(tmp_path, teacher, rows, concurrency):
    teacher.faults = {1: "cut", 3: "break", 5: 429, 6: 500}
    output = tmp_path / "out" / "rows.jsonl"
    paid = {**PRICES, "concurrency": concurrency}
    limits = [150, 600, 900]
    for limit in limits:
        with pytest.raises(SpendLimitError, match=f"beyond endpoint.max_spend {limit}: spent .* of {limit} on"):
            distill(teacher, rows, output, samples=10, max_spend=limit, **paid)
        assert cost(teacher.tokens) <= limit
        assert not output.exists()
    at_most = len(TEXTS[0]) + 2 * 64 + 2 * MAX_TOKENS  # of one request; two were lost, and the next does not fit
    assert cost(teacher.tokens) > limits[-1] - 3 * at_most
    report = distill(teacher, rows, output, samples=10, max_spend=1e6, **paid)
    assert report["counts"]["kept"] == 60
    assert teacher.answered.total() == 60
    tokens = [answer_to(text, seed)[2] for text, seed in teacher.answered]
    assert report["tokens"] == {"prompt": 60 * PROMPT_TOKENS, "completion": sum(tokens)}


def test_no_limit_on_spending_without_prices(tmp_path, teacher, rows, capsys):
    with pytest.raises(SystemExit):
        distill(teacher, rows, tmp_path / "out" / "rows.jsonl", max_spend=5)
    assert "endpoint.max_spend needs endpoint.input_price" in capsys.readouterr().err


def test_rows_of_what_is_there_ask_nothing(tmp_path, teacher, rows):
    output = tmp_path / "out" / "rows.jsonl"
    with pytest.raises(SpendLimitError):
        distill(teacher, rows, output, max_spend=400, **PRICES)
    asked = teacher.asked.total()
    report = distill(teacher, rows, output, "--recorded")
    assert teacher.asked.total() == asked
    assert 0 < report["counts"]["kept"] < 18
    assert report["counts"]["kept"] + report["dropped"]["missing"] == 18
    assert distill(teacher, rows, output, "--recorded") is None


def test_killed_at_any_instant_it_goes_on_to_the_same_files_within_the_limit(tmp_path, teacher):
    rows = write(tmp_path / "rows.jsonl", *map(problem, TEXTS[:3]))
    arguments = {"samples": 2, "concurrency": 2, "max_spend": 700, **PRICES}
    distill(teacher, rows, tmp_path / "whole" / "rows.jsonl", **arguments)
    whole = files_but_the_store(tmp_path / "whole")
    for instant in range(100):
        teacher.asked.clear(), teacher.answered.clear()
        teacher.tokens[:] = 0, 0
        output = tmp_path / str(instant) / "rows.jsonl"
        given = arguments_of(teacher, rows, output, **arguments)
        watched = [(LineFile, "add"), (os, "replace"), (os, "fsync"), (chat_api, "read_completion")]
        done = curate_until(instant, watched, *given)
        if output.exists():
            assert files_but_the_store(output.parent) == whole
        curate(*given)
        assert files_but_the_store(output.parent) == whole
        assert cost(teacher.tokens) <= 700
        lines = [line["key"] for line in read(output.parent / "responses.jsonl") if "key" in line]
        assert len(lines) == len(set(lines)) == 6
        if done:
            break
    assert instant >= 20


def test_a_response_cut_at_any_byte_is_drawn_again(tmp_path, teacher):
    rows = write(tmp_path / "rows.jsonl", problem("Problem 1"))
    output = tmp_path / "out" / "rows.jsonl"
    distill(teacher, rows, output, samples=1)
    whole, store = files_but_the_store(output.parent), (output.parent / "responses.jsonl").read_bytes()
    for size in range(0, len(store), 9):
        cut = tmp_path / str(size) / "rows.jsonl"
        cut.parent.mkdir()
        cut.with_name("responses.jsonl").write_bytes(store[:size])
        distill(teacher, rows, cut, samples=1)
        assert files_but_the_store(cut.parent) == whole
        (line,) = [line for line in read(cut.with_name("responses.jsonl")) if "key" in line]
        assert line == json.loads(store.splitlines()[-1])
    output.with_name("responses.jsonl").write_bytes(b'{"key": 5}\n' + store)
    with pytest.raises(StoreError, match=r"responses\.jsonl:1 is damaged"):
        distill(teacher, rows, output, "--force", samples=2)


def test_bad_rows_are_counted_with_their_places_and_cost_nothing(tmp_path, teacher):
    tools = {**CHAT, "tools": [{"name": "f"}]}
    no_user = {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}
    lines = [b"{", problem("Problem 1"), {"prompt": "x"}, tools, no_user, problem("Problem 2"), {"messages": "x"}]
    rows = write(tmp_path / "rows.jsonl", *lines)
    report = distill(teacher, rows, tmp_path / "out" / "rows.jsonl", samples=1)
    assert report["counts"] == {"rows": 7, "kept": 2, "dropped": 0, "bad": 5}
    places = {(example["row"], kind) for kind, examples in report["examples"].items() for example in examples}
    assert places == {
        (1, "malformed_json"), (3, "missing_field"), (4, "uses_tools"), (5, "wrong_type"), (7, "wrong_type")
    }  # fmt: skip
    teacher.asked.clear()
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        distill(teacher, rows, tmp_path / "strict" / "rows.jsonl", "--strict", samples=2)
    assert not teacher.asked


def test_what_is_under_way_is_kept_when_another_request_fails_for_good(tmp_path, teacher, rows):
    teacher.faults = {5: 401}
    with pytest.raises(EndpointError, match="status 401"):
        distill(teacher, rows, tmp_path / "out" / "rows.jsonl")
    kept = [line for line in read(tmp_path / "out" / "responses.jsonl") if "key" in line]
    assert len(kept) == teacher.answered.total() >= 4
    assert teacher.asked.total() < 18


def test_thinking_that_the_template_opened_is_opened_in_the_row():
    assert with_thinking_opened("So.\n</think>\n\n5") == "<think>\nSo.\n</think>\n\n5"
    for text in ("<think>\nSo.\n</think>\n\n5", "no thinking", "<think> cut off"):
        assert with_thinking_opened(text) == text


@pytest.mark.parametrize("name", ["responses.jsonl", "grades.jsonl"])
def test_the_output_is_not_where_results_are_kept(tmp_path, teacher, rows, name):
    with pytest.raises(DataError, match="where responses or grades are kept"):
        distill(teacher, rows, tmp_path / name)
    assert not teacher.asked
