"""Data files: every mistake is named with its file, line and what was expected."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.data.rows import DataError, read_row
from megatron_klear.data.sources import file_digest, find_files, parse_chunk, read_chunks, resolve_files

GOOD = '{"prompt": "q", "response": "a"}'


def read(path: Path) -> list[tuple[int, Any]]:
    return [pair for chunk in read_chunks(path) for pair in parse_chunk(chunk)]


BAD_LINES = {
    "not JSON": ("{", "not valid JSON"),
    "not UTF-8": ('{"prompt": "\xff"}', "not valid JSON"),
    "a list": ("[1]", "of type list"),
    "other keys": ('{"question": "q", "answer": "a"}', "has the keys answer, question"),
    "no response": ('{"prompt": "q"}', "has the keys prompt"),
    "response is a number": ('{"prompt": "q", "response": 1}', "`response` is of type int"),
    "messages is a text": ('{"messages": "hi"}', "`messages` is of type str"),
    "no messages": ('{"messages": []}', "`messages` is an empty list"),
    "empty prompt list": ('{"prompt": [], "response": "a"}', "`prompt` is an empty list"),
    "message is a text": ('{"messages": ["hi"]}', r"`messages\[0\]` is of type str"),
    "sharegpt": ('{"messages": [{"from": "human", "value": "q"}]}', r"`messages\[0\]\.role` is None"),
    "unknown role": ('{"messages": [{"role": "human", "content": "q"}]}', "'human', expected one of"),
    "no content": ('{"messages": [{"role": "user"}]}', r"`messages\[0\]\.content` is missing"),
    "image part": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "has a part that is not"),
    "reasoning is a list": ('{"messages": [{"role": "assistant", "content": "a", "thinking": []}]}', "thinking"),
    "tools are not JSON": ('{"prompt": "q", "response": "a", "tools": "{"}', "`tools` is a text that is not JSON"),
    "tools are texts": ('{"prompt": "q", "response": "a", "tools": ["x"]}', "`tools` must be a list"),
    "noncharacter": ('{"prompt": "q", "response": "\\ufdd0"}', "noncharacter"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, case: str) -> None:
    line, words = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([GOOD, "", line, GOOD]).encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert f"{path}:3: " in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "missing": (["absent.jsonl"], "does not exist"),
    "glob without match": (["*.parquet"], "no file matches"),
    "empty": (["empty.jsonl"], "is empty"),
    "folder": (["."], "is not a file but a folder"),
    "suffix": (["rows.csv"], "is neither .jsonl nor .parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.csv").write_text("a,b")
    patterns, words = BAD_FILES[case]
    with pytest.raises(DataError, match=words) as caught:
        resolve_files([str(tmp_path / pattern) for pattern in patterns], "data.train")
    assert str(caught.value).startswith("data.train: ")


def test_names_with_brackets_are_files_and_not_only_globs(tmp_path: Path) -> None:
    folder = tmp_path / "[team]"
    folder.mkdir()
    for name in ("rows [1].jsonl", "rows 1.jsonl", "other.jsonl"):
        (folder / name).write_text("{}")

    def found(pattern: str) -> list[str]:
        return [path.name for path in find_files(str(folder / pattern))]

    assert found("rows [1].jsonl") == ["rows [1].jsonl"]
    assert found("rows [12].jsonl") == ["rows 1.jsonl"]
    assert found("*.jsonl") == ["other.jsonl", "rows 1.jsonl", "rows [1].jsonl"]
    assert found("absent.jsonl") == found("[xyz].jsonl") == []
    paths = resolve_files([str(folder / "rows [1].jsonl"), str(folder / "o*.jsonl")], "data.train")
    assert [path.name for path in paths] == ["rows [1].jsonl", "other.jsonl"]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable Parquet file"):
        read(path)


def test_bad_parquet_row_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "q", "response": "a"}] * 700 + [{"prompt": "q"}])
    with pytest.raises(DataError, match=r"rows\.parquet: row 701: "):
        read(path)


def test_globs_are_sorted_and_paths_keep_their_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD)
    found = resolve_files([str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl")], "data.train")
    assert [path.stem for path in found] == ["c", "a", "b"]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    return path


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    rows = []
    for index in range(1300):
        extra = {"reasoning_content": "why"} if index % 3 == 0 else {}
        messages = [{"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": "a" * index, **extra}]
        rows.append({"messages": messages, "note": index})
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)))
    lines, table = read(path), read(write_parquet(tmp_path / "rows.parquet", rows))
    assert lines == table
    assert [number for number, _ in lines] == list(range(1, 1301))
    assert [row.fraction() for _, row in lines] == [row.fraction() for _, row in table]


@given(st.lists(st.text(min_size=1).filter(lambda text: not any(m in text for m in "\ufdd0\ufdd1\ufdd2")), min_size=8))
def test_fraction_depends_on_content_alone(texts: list[str]) -> None:
    fractions = [read_row({"prompt": text, "response": "a", "id": i}).fraction() for i, text in enumerate(texts)]
    assert fractions == [read_row({"messages": None, "prompt": text, "response": "a"}).fraction() for text in texts]
    assert len(set(fractions)) == len(set(texts))
    assert all(0 <= fraction < 1 for fraction in fractions)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path, memo = tmp_path / "rows.jsonl", tmp_path / "memo"
    path.write_text("one")
    first = file_digest(path, memo)
    path.write_text("two")
    second = file_digest(path, memo)
    path.write_text("one")
    assert first != second
    assert first == file_digest(path, memo)


def test_settled_digest_is_remembered_and_forgotten_on_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memo = tmp_path / "rows.jsonl", tmp_path / "memo"
    path.write_text("one")
    monkeypatch.setattr("megatron_klear.data.sources._SETTLED_SECONDS", -1.0)
    first = file_digest(path, memo)
    (entry,) = memo.iterdir()
    entry.write_text("f" * 64)
    assert file_digest(path, memo) == "f" * 64
    path.write_text("other")
    assert file_digest(path, memo) not in (first, "f" * 64)
