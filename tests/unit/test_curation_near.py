"""Near duplicates: what is planted is found, what is dropped is near, and the first stays."""

import random

import pytest
from curation_rows import contents, curate, problem, read, sentence, write

from megatron_klear.curation.near import shingles
from megatron_klear.data.rows import DataError

pytest.importorskip("rensa", reason="the extra `curation` is not installed")


def edited(text: str, chosen: random.Random) -> str:
    """The text with one to three words replaced, left out or put in."""
    words = text.split()
    for _ in range(chosen.randint(1, 3)):
        place, kind = chosen.randrange(len(words)), chosen.randrange(3)
        words[place : place + (kind < 2)] = [f"new{chosen.randrange(1000)}"] if kind else []
    return " ".join(words)


def jaccard(one: str, other: str) -> float:
    """The plain way."""
    sets = [
        {tuple(words[k : k + 5]) for k in range(len(words) - 4)}
        for words in (text.lower().split() for text in (one, other))
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("bound", [0.5, 0.7, 0.9])
def test_planted_pairs_are_found_and_nothing_else_is_dropped(tmp_path, bound):
    chosen = random.Random(7)
    originals = [sentence(k, chosen.randint(12, 200)) for k in range(1200)]
    copies = [edited(text, chosen) for text in originals]
    first, second = (
        write(tmp_path / f"{k}.jsonl", *map(problem, texts)) for k, texts in enumerate((originals, copies))
    )
    output = tmp_path / "out" / "rows.jsonl"
    report = curate("deduplicate", "--input", first, second, "--output", output, "--near", "--min-jaccard", bound)
    kept = [row["prompt"] for row in read(output)]
    assert kept[: len(originals)] == originals
    near = [copy for copy, text in zip(copies, originals, strict=True) if jaccard(copy, text) >= bound]
    dropped = set(copies) - set(kept)
    assert len(near) > 100
    assert len(dropped & set(near)) >= 0.9 * len(near)
    assert dropped <= set(near)
    for example in report["examples"]["near_duplicate"]:
        pair = copies[example["row"] - 1], originals[example["kept"]["row"] - 1]
        assert example["jaccard"] == round(jaccard(*pair), 4)


def test_workers_change_nothing_and_without_near_none_is_dropped(tmp_path):
    chosen = random.Random(3)
    texts = [text for k in range(700) for text in (sentence(k, 40), edited(sentence(k, 40), chosen))]
    rows = write(tmp_path / "rows.jsonl", *map(problem, texts))
    given = ("deduplicate", "--input", rows, "--output")
    for workers in (1, 3):
        curate(*given, tmp_path / str(workers) / "rows.jsonl", "--near", "--workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert "near_duplicate" not in curate(*given, tmp_path / "plain" / "rows.jsonl")["dropped"]


def test_short_texts_are_near_where_they_are_equal_alone(tmp_path):
    texts = ["What is 2 + 3?", "What is 2 - 3?", "what is 2 +  3?", "2 + 3", "2 + 4"]
    rows = write(tmp_path / "rows.jsonl", *map(problem, texts))
    report = curate("deduplicate", "--input", rows, "--output", tmp_path / "o" / "rows.jsonl", "--near")
    assert report["dropped"] == {"duplicate": 1}
    assert shingles("a b c") == {"a b c"}


def test_the_bound_needs_near_and_near_needs_its_package(tmp_path, monkeypatch, capsys):
    rows = write(tmp_path / "rows.jsonl", problem("x"))
    given = ("deduplicate", "--input", rows, "--output", tmp_path / "o" / "rows.jsonl")
    with pytest.raises(SystemExit):
        curate(*given, "--min-jaccard", "0.5")
    assert "min_jaccard goes with near" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(DataError, match=r"megatron-klear\[curation\]"):
        curate(*given, "--near")
    assert not (tmp_path / "o").exists()
