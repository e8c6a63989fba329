"""The stream of prompts: complete, mixed, shuffled, resumable, the same everywhere."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_klear.data.prompts import PromptStream
from megatron_klear.data.rows import DataError
from megatron_klear.data.tokenizer import ChatTokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny_tokenizer"
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@dataclass
class Source:
    files: tuple[str, ...] = ()
    generator: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    count: int = 20
    weight: float = 1.0


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(TINY)


def row(text: str, source: str = "math", truth: Any = "1", **extra: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": text}]
    return {"prompt": prompt, "data_source": source, "reward_model": {"style": "rule", "ground_truth": truth}, **extra}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def stream(tokenizer: ChatTokenizer, *sources: Source, **settings: Any) -> PromptStream:
    return PromptStream(sources, tokenizer, **({"max_tokens": 512, "seed": 1} | settings))


def test_every_prompt_once_an_epoch_in_a_new_order(tokenizer: ChatTokenizer) -> None:
    prompts = stream(tokenizer, Source(generator="arithmetic", count=50))
    epochs = [[prompt.id for prompt in prompts.take(50)] for _ in range(3)]
    assert len(set(epochs[0])) == 50
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts.epochs == [3.0]
    assert sorted(prompt.id for prompt in prompts.all) == sorted(epochs[0])


def test_ranks_agree_and_the_size_of_a_bite_does_not_matter(tokenizer: ChatTokenizer) -> None:
    sources = Source(generator="arithmetic", count=9), Source(generator="arithmetic", settings={"digits": 1}, weight=2)
    one, other = stream(tokenizer, *sources), stream(tokenizer, *sources)
    bites = [prompt.id for count in (1, 7, 0, 22) for prompt in other.take(count)]
    assert [prompt.id for prompt in one.take(30)] == bites
    assert bites != [prompt.id for prompt in stream(tokenizer, *sources, seed=2).take(30)]


def test_generator_takes_every_setting_of_its_function(tokenizer: ChatTokenizer) -> None:
    settings = {"seed": 3, "terms": 2, "digits": 1, "operators": "-", "slip_share": 0.5}
    prompts = stream(tokenizer, Source(generator="arithmetic", settings=settings, count=20)).all
    assert all(" - " in prompt.text and " + " not in prompt.text for prompt in prompts)


@pytest.mark.parametrize("position", [0, 3, 20, 21, 75])
def test_resuming_gives_what_would_have_come(tokenizer: ChatTokenizer, position: int) -> None:
    sources = Source(generator="arithmetic"), Source(generator="arithmetic", settings={"terms": 2}, count=7, weight=0.4)
    whole = stream(tokenizer, *sources)
    whole.take(position)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream(tokenizer, *sources)
    resumed.take(5)
    resumed.load_state_dict(state)
    assert [prompt.id for prompt in resumed.take(60)] == [prompt.id for prompt in whole.take(60)]


def test_position_of_other_data_is_refused(tokenizer: ChatTokenizer) -> None:
    state = stream(tokenizer, Source(generator="arithmetic")).state_dict()
    with pytest.raises(DataError, match=r"prompts was \[20\] and is \[21\]"):
        stream(tokenizer, Source(generator="arithmetic", count=21)).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 1 and is 3"):
        stream(tokenizer, Source(generator="arithmetic", settings={"seed": 1}), seed=3).load_state_dict(state)


def test_sources_keep_their_share_at_every_point(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = {name: [row(f"{name}{i}", name) for i in range(size)] for name, size in (("a", 3), ("b", 40), ("c", 10))}
    sources = [
        Source(files=(write(tmp_path / f"{name}.jsonl", rows[name]),), weight=weight)
        for name, weight in (("a", 1.0), ("b", 5.0), ("c", 2.0))
    ]
    prompts = stream(tokenizer, *sources)
    assert (len(prompts), prompts.data_sources) == (53, {"a", "b", "c"})
    taken: Counter[str] = Counter()
    for total in range(1, 200):
        taken[prompts.take(1)[0].data_source] += 1
        for name, share in (("a", 1 / 8), ("b", 5 / 8), ("c", 2 / 8)):
            assert abs(taken[name] - share * total) <= 1.5


def test_parquet_and_jsonl_give_the_same_prompts(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [row(f"What is {i}?", truth=str(i), ability="math", extra_info={"index": i}) for i in range(30)]
    found = [
        stream(tokenizer, Source(files=(write(tmp_path / name, rows),))).take(30) for name in ("r.jsonl", "r.parquet")
    ]
    assert [(p.id, p.ground_truth, p.text) for p in found[0]] == [(p.id, p.ground_truth, p.text) for p in found[1]]
    assert found[0][0].tokens.dtype == np.int32


def test_ids_depend_on_the_problem_alone_and_repeats_are_told_apart(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [row("p"), row("q"), row("p", truth="2"), row("p"), row("p", "gsm8k"), row("p")]
    whole = stream(tokenizer, Source(files=(write(tmp_path / "whole.jsonl", rows),)))
    files = write(tmp_path / "1.jsonl", rows[3:]), write(tmp_path / "0.jsonl", rows[:3])
    assert stream(tokenizer, Source(files=files)).ids == whole.ids
    assert len(whole.ids) == 6
    assert sum("#" in name for name in whole.ids) == 2


def test_overlong_prompts_are_counted_and_held_out_ones_left_out(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row("short"), row("long " * 300), row("held out")])
    (held,) = stream(tokenizer, Source(files=(write(tmp_path / "held.jsonl", [row("held out")]),))).ids
    prompts = stream(tokenizer, Source(files=(path,)), max_tokens=100, exclude={held})
    assert (len(prompts), prompts.overlong, prompts.excluded) == (1, 1, 1)
    with pytest.raises(DataError, match=r"prompts\.sources\[0\]: no prompt is left: 3 are longer"):
        stream(tokenizer, Source(files=(path,)), max_tokens=1)


def test_thinking_reaches_the_template(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(THINKING_TEMPLATE)
    tokenizer = load_tokenizer(TINY, template)
    source = Source(files=(write(tmp_path / "r.jsonl", [row("q")]),))
    texts = {flag: stream(tokenizer, source, thinking=flag).take(1)[0].text for flag in (None, True, False)}
    assert texts[None] == texts[True] == "user: q\nassistant:"
    assert texts[False] == "user: q\nassistant:<think></think>"


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no prompt": ({"data_source": "math"}, "`prompt` is missing"),
    "no source": ({"prompt": "q", "reward_model": {"ground_truth": 1}}, "`data_source` is missing"),
    "no truth": ({"prompt": "q", "data_source": "m"}, r"`reward_model\.ground_truth` is missing"),
    "truth is null": ({**row("q"), "reward_model": {"ground_truth": None}}, r"`reward_model\.ground_truth` is missing"),
    "answered": ({**row("q"), "prompt": [{"role": "assistant", "content": "a"}]}, "ends with an assistant's message"),
    "a list": ([1], "the row is of type list"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(tokenizer: ChatTokenizer, tmp_path: Path, case: str) -> None:
    bad, words = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("fine")) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=words) as caught:
        stream(tokenizer, Source(files=(str(path),)))
    assert str(caught.value).startswith(f"{path}:3: ")


BAD_SOURCES = {
    "unknown generator": (Source(generator="sudoku"), r"prompts\.sources\[0\]\.generator 'sudoku' is unknown"),
    "no task": (Source(generator="reasoning_gym"), "is unknown: arithmetic, or reasoning_gym:TASK"),
    "unknown setting": (Source(generator="arithmetic", settings={"digit": 3}), r"settings\.digit is unknown.*digits"),
    "setting of a wrong type": (Source(generator="arithmetic", settings={"digits": "3"}), "expected a whole number"),
    "a number for a text": (Source(generator="arithmetic", settings={"operators": 3}), "expected a text"),
    "a text for a number": (Source(generator="arithmetic", settings={"slip_share": "0.1"}), "expected a number"),
    "setting out of range": (Source(generator="arithmetic", settings={"terms": 1}), "terms >= 2"),
    "missing file": (Source(files=("absent.jsonl",)), r"prompts\.sources\[0\]\.files: absent\.jsonl does not exist"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_are_named(tokenizer: ChatTokenizer, case: str) -> None:
    source, words = BAD_SOURCES[case]
    with pytest.raises(DataError, match=words):
        stream(tokenizer, source)


def test_reasoning_gym_is_asked_for_by_name(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        stream(tokenizer, Source(generator="reasoning_gym:leg_counting"))


def test_reasoning_gym_problems_are_scored_by_their_task(tokenizer: ChatTokenizer) -> None:
    pytest.importorskip("reasoning_gym", reason="the reasoning-gym package is absent")
    from megatron_klear.rewards.base import RewardSettings, resolve

    prompts = stream(tokenizer, Source(generator="reasoning_gym:leg_counting", count=4), max_tokens=4096)
    reward = resolve("reasoning_gym/leg_counting", RewardSettings(require_thinking=False))
    for prompt in prompts.take(4):
        answer = prompt.ground_truth["entry"]["answer"]
        assert reward(f"\\boxed{{{answer}}}", prompt.ground_truth).reward == 1.0
        assert reward("\\boxed{-7}", prompt.ground_truth).reward == -1.0
        assert reward("no idea", prompt.ground_truth).verdict == "malformed"
