"""Files of one JSON list: the same rows as lines, whatever their layout and wherever a read ends."""

import json

import pytest
from curation_rows import contents, curate, problem, read, sentence, write

from megatron_klear.curation import json_list
from megatron_klear.data.rows import DataError

ROWS = [problem(text) for text in ("a, [b] {c}", '\\n \\\\ "quoted"', "größe 漢字 😀", sentence(1, 20))]


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("layout", [None, 1, "\t"])
def test_a_list_gives_the_rows_of_lines(tmp_path, monkeypatch, read_bytes, layout):
    monkeypatch.setattr(json_list, "_READ_BYTES", read_bytes)
    (tmp_path / "rows.json").write_text("\ufeff " + json.dumps(ROWS, indent=layout, ensure_ascii=False) + "\n\n")
    curate("deduplicate", "--input", tmp_path / "rows.json", "--output", tmp_path / "out" / "rows.jsonl")
    assert read(tmp_path / "out" / "rows.jsonl") == ROWS


def test_lines_in_a_json_file_are_lines(tmp_path):
    write(tmp_path / "rows.json", *ROWS)
    curate("deduplicate", "--input", tmp_path / "rows.json", "--output", tmp_path / "out" / "rows.jsonl")
    assert read(tmp_path / "out" / "rows.jsonl") == ROWS


def test_benchmarks_may_be_lists(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *ROWS)
    items = [{"problem": sentence(1, 20)}, {"problem": sentence(2, 20)}]
    write(tmp_path / "bench.jsonl", *items)
    (tmp_path / "bench.json").write_text(json.dumps(items, indent=2))
    for kind in ("json", "jsonl"):
        given = ("--against", tmp_path / f"bench.{kind}", "--output", tmp_path / kind / "rows.jsonl")
        assert curate("decontaminate", "--input", rows, *given)["dropped"] == {"contaminated": 1}
    assert contents(tmp_path / "json")["rows.jsonl"] == contents(tmp_path / "jsonl")["rows.jsonl"]


def test_an_element_that_is_no_row_costs_itself_alone(tmp_path):
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "rows.json").write_bytes(b"[" + b", ".join([b"5", b'{"prompt": "caf\xe9"}', b"NaN", good]) + b"]")
    report = curate("deduplicate", "--input", tmp_path / "rows.json", "--output", tmp_path / "out" / "rows.jsonl")
    assert report["bad"] == {"bad_encoding": 1, "malformed_json": 1, "wrong_type": 1}
    assert report["counts"]["kept"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", "is an empty list"),
        (b'[{"a": 1}', "row 1 is no valid JSON, or longer"),
        (b'[{"a": 1}, {"b" 2}]', "row 2 is no valid JSON, or longer"),
        (b'[{"a": 1} {"b": 2}]', "row 1 is no valid JSON, or longer"),
        (b'[{"a": 1}] []', "more follows the list"),
        (b'[{"a": "' + b"x" * 3_000_000 + b'"}]', "longer than 131072 bytes"),
    ],
)
def test_a_broken_list_stops_with_its_place(tmp_path, content, told):
    (tmp_path / "rows.json").write_bytes(content)
    given = ("--input", tmp_path / "rows.json", "--output", tmp_path / "out" / "rows.jsonl", "--max-row-mib", 0.125)
    with pytest.raises(DataError, match=told):
        curate("deduplicate", *given)
