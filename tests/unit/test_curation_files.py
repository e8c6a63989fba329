"""Curation from files to files: what is kept, what is counted as bad, and that a kill leaves nothing half done."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_rows import contents, curate, problem, read, sentence, write

from megatron_klear.data.rows import DataError
from megatron_klear.data.sources import parse_chunk, read_chunks

CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]}


@pytest.fixture
def of_verb(tmp_path):
    """The arguments that a verb needs besides input and output."""
    bench = write(tmp_path / "bench.jsonl", {"problem": sentence(1, 20)})
    return {"deduplicate": (), "decontaminate": ("--against", bench, "--rule", "careful")}


def test_the_first_file_s_row_stays_as_it_is(tmp_path):
    first = write(
        tmp_path / "z.jsonl", problem("Find x."), b'{"messages":  [{"role": "user", "content": "Hi"}], "id":1.0}'
    )
    second = write(tmp_path / "a.jsonl", problem(" find\tX."), CHAT, problem("HI"), problem("What is 2 + 3?"))
    output = tmp_path / "out" / "rows.jsonl"
    report = curate("deduplicate", "--input", first, second, "--output", output)
    assert output.read_bytes() == first.read_bytes() + json.dumps(CHAT).encode() + b"\n"
    assert [source["dropped"] for source in report["sources"]] == [0, 3]
    assert report["examples"]["duplicate"] == [
        {"file": str(second), "row": 1, "kept": {"file": str(first), "row": 1}, "problem": " find\tX."},
        {"file": str(second), "row": 3, "kept": {"file": str(first), "row": 2}, "problem": "HI"},
        {"file": str(second), "row": 4, "kept": {"file": str(second), "row": 2}, "problem": "What is 2 + 3?"},
    ]


def test_no_more_than_twenty_examples_are_shown(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *[problem("again")] * 50)
    report = curate("deduplicate", "--input", rows, "--output", tmp_path / "out" / "rows.jsonl")
    assert report["dropped"] == {"duplicate": 49}
    assert [example["row"] for example in report["examples"]["duplicate"]] == list(range(2, 22))


def test_the_manifest_has_hashes_counts_and_settings(tmp_path, of_verb):
    rows = write(tmp_path / "rows.jsonl", problem("one"), problem("two"), problem(sentence(1, 20)))
    output = tmp_path / "out" / "rows.jsonl"
    curate("decontaminate", "--input", rows, "--output", output, *of_verb["decontaminate"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"] == {
        "rule": "careful",
        "gram_words": 9,
        "fewest_contained_words": 3,
        "max_items": 1,
        "min_share": 0.1,
        "family_share": 0.6,
        "max_row_bytes": 16 << 20,
        "strict": False,
    }
    assert manifest["counts"] == {"rows": 3, "kept": 2, "dropped": 1, "bad": 0}
    assert [entry["path"] for entry in manifest["inputs"]] == [str(rows)]
    assert {entry["path"] for entry in manifest["outputs"]} == {
        "rows.jsonl",
        "report.json",
        "report.html",
        "hits.jsonl",
    }
    for entry in [*manifest["inputs"], *manifest["against"], *manifest["outputs"]]:
        content = (tmp_path / "out" / entry["path"]).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_and_several_workers_give_the_same_bytes(tmp_path, of_verb, suffix):
    overlap = sentence(1, 20)
    texts = [sentence(k, 30) + (overlap if k % 7 == 0 else "") for k in range(10, 2010)]
    rows = write(tmp_path / "rows.jsonl", *map(problem, texts), b"{")
    given = ("--input", rows, *of_verb["decontaminate"])
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        curate("decontaminate", *given, "--output", tmp_path / name / f"rows.{suffix}", "--workers", workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "again") == contents(tmp_path / "three")
    assert len(read(tmp_path / "one" / "hits.jsonl")) == sum(k % 7 == 0 for k in range(10, 2010))


def test_parquet_is_read_and_written(tmp_path):
    later = {**problem([{"role": "user", "content": "later", "name": "me"}]), "extra_info": {"only": "here"}}
    several = [problem([{"role": "user", "content": f"Problem {k}"}]) for k in range(2000)]
    jsonl = write(tmp_path / "rows.jsonl", *several, later)
    curate("deduplicate", "--input", jsonl, "--output", tmp_path / "a" / "rows.parquet")
    table = pq.read_table(tmp_path / "a" / "rows.parquet")
    assert table.num_rows == 2001
    assert table.to_pylist()[-1] == later
    curate("deduplicate", "--input", tmp_path / "a" / "rows.parquet", "--output", tmp_path / "b" / "rows.jsonl")
    assert read(tmp_path / "b" / "rows.jsonl")[-1] == later


def test_a_parquet_row_that_is_not_utf_8_costs_itself_alone(tmp_path):
    texts = pa.array([b"What is 1?", b"caf\xe9", b"What is 2?"]).cast(pa.binary()).view(pa.string())
    answers = pa.array(["1", "2", "2"])
    pq.write_table(pa.table({"prompt": texts, "response": answers}), tmp_path / "rows.parquet")
    output = tmp_path / "out" / "rows.jsonl"
    report = curate("deduplicate", "--input", tmp_path / "rows.parquet", "--output", output)
    assert [row["response"] for row in read(output)] == ["1", "2"]
    assert report["examples"]["bad_encoding"][0]["row"] == 2


def test_rows_that_fit_no_schema_are_refused_as_parquet(tmp_path):
    rows = write(tmp_path / "rows.jsonl", {**CHAT, "id": 1}, {**problem("x"), "id": "one"})
    with pytest.raises(DataError, match=r"write \.jsonl"):
        curate("deduplicate", "--input", rows, "--output", tmp_path / "out" / "rows.parquet")
    assert not contents(tmp_path / "out")


def test_what_is_done_is_not_done_again_and_nothing_is_replaced_unasked(tmp_path):
    rows, output = write(tmp_path / "rows.jsonl", problem("one")), tmp_path / "out" / "rows.jsonl"
    given = ("deduplicate", "--input", rows, "--output", output)
    assert curate(*given) is not None
    assert curate(*given) is None
    write(rows, problem("another"))
    with pytest.raises(DataError, match="exists and is what other inputs or settings gave"):
        curate(*given)
    assert curate(*given, "--force") is not None
    assert read(output) == [problem("another")]
    output.write_text("damaged")
    with pytest.raises(DataError, match="exists"):
        curate(*given)


def test_the_output_is_training_data(tmp_path):
    rows = write(tmp_path / "rows.jsonl", CHAT, b"\xff", {"prompt": "Hi", "response": "Ho"})
    curate("deduplicate", "--input", rows, "--output", tmp_path / "out" / "rows.jsonl")
    (chunk,) = read_chunks(tmp_path / "out" / "rows.jsonl")
    assert len(list(parse_chunk(chunk))) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input", "absent.jsonl", "--output", "o.jsonl"], "--input: absent.jsonl does not exist"),
        (["--input", "rows.jsonl", "rows.jsonl", "--output", "o.jsonl"], "twice"),
        (["--input", "rows.jsonl", "--output", "rows.jsonl"], "among the files that are read"),
        (["--input", "rows.jsonl", "--output", "o.csv"], "neither .jsonl nor .parquet"),
        (["--input", "rows.jsonl", "--output", "folder.jsonl"], "is a folder"),
        (["--input", "bad.jsonl", "--output", "o.jsonl"], "no row is left of 1"),
        (["--input", "rows.jsonl", "--output", "foreign/o.jsonl"], "manifest.json is no manifest"),
        (["--input", "rows.jsonl", "--output", "taken/o.jsonl"], "is the manifest of other.jsonl"),
        (["--input", "rows.jsonl", "--output", "reported/o.jsonl"], "report.json is of no curation"),
        (["--input", "rows.jsonl", "--output", "there.jsonl"], "no output of a curation"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", problem("x"))
    write(tmp_path / "bad.jsonl", b"{")
    write(tmp_path / "there.jsonl", problem("y"))
    for name in ("folder.jsonl", "foreign", "taken", "reported"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("[]")
    (tmp_path / "taken" / "manifest.json").write_text('{"outputs": [{"path": "other.jsonl"}]}')
    (tmp_path / "reported" / "report.json").write_text("{}")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(DataError, match=told):
        curate("deduplicate", *arguments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rule", "paper", "--min-share", "0.5"],
        ["--rule", "careful", "--min-share", "1.5"],
        ["--rule", "careful", "--max-items", "0"],
        ["--rule", "careful", "--workers", "0"],
        ["--rule", "careful", "--max-row-mib", "0"],
        ["--rule", "other"],
        ["--min-share", "0.5"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, arguments, capsys):
    rows = write(tmp_path / "rows.jsonl", problem("x"))
    given = ("--input", rows, "--output", tmp_path / "o.jsonl", "--against", rows)
    with pytest.raises(SystemExit):
        curate("decontaminate", *given, *arguments)
    assert "usage:" in capsys.readouterr().err
