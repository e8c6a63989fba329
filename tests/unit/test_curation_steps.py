"""A build gives what its verbs give by hand, does nothing twice, and says which step cannot be done."""

import json

import pytest
from curation_rows import curate, problem, read, sentence, write

from megatron_klear.cli.curate import main

CONFIG = """
output = "out"
[[sources]]
name = "first"
files = ["a.jsonl"]
[[sources]]
name = "second"
files = ["b.jsonl", "c.jsonl"]
[sft]
sources = ["first"]
[math_rl]
sources = ["second", "first"]
steps = [
  { kind = "deduplicate" },
  { kind = "decontaminate", against = ["bench.jsonl"], rule = "careful" },
  { kind = "select", source = "curated_from", per_source = 6 },
]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three files of rows, one with answers, a benchmark, and a build of two sets."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *({**problem(sentence(k, 20)), "response": "x"} for k in range(8)), b"{")
    write(tmp_path / "b.jsonl", *(problem(sentence(k, 20)) for k in range(4, 12)))
    write(tmp_path / "c.jsonl", b'{"prompt": "odd", "data_source": "c", "reward_model": {"ground_truth": 1.0} }')
    write(tmp_path / "bench.jsonl", {"problem": sentence(5, 20)})
    (tmp_path / "build.toml").write_text(CONFIG)
    return tmp_path


def build(*flags: str) -> None:
    main(["build", "--config", "build.toml", *flags])


def test_a_build_is_its_verbs_one_after_another(folder):
    build()
    inputs = ["b.jsonl", "c.jsonl", "a.jsonl"]
    curate("deduplicate", "--input", *inputs, "--output", "1/rows.jsonl")
    given = ("--input", "1/rows.jsonl", "--output", "2/rows.jsonl")
    curate("decontaminate", *given, "--against", "bench.jsonl", "--rule", "careful")
    by_hand = read(folder / "2" / "rows.jsonl")
    rows = read(folder / "out" / "math_rl" / "rows.jsonl")
    assert [row.pop("curated_from") for row in rows] == ["second"] * 6 + ["first"] * 4
    assert rows == [row for row in by_hand if row in rows]
    assert len(by_hand) == 12
    report = json.loads((folder / "out" / "report.json").read_bytes())
    assert [len(made["steps"]) for made in report["sets"].values()] == [2, 5]
    assert report["sets"]["math_rl"]["steps"][-1]["shares"] == {"second": 6, "first": 4}
    assert report["sets"]["sft"]["steps"][0]["bad"] == {"malformed_json": 1}
    assert report["sets"]["sft"]["rows"] == 8


def test_a_row_keeps_its_bytes(folder):
    build()
    (odd,) = [line for line in (folder / "out/math_rl/0-gather/rows.jsonl").read_text().splitlines() if "odd" in line]
    told = '"prompt": "odd", "data_source": "c", "reward_model": {"ground_truth": 1.0}, "curated_from": "second"'
    assert odd == f"{{{told}}}"


def test_what_is_done_is_not_done_again_and_a_changed_step_is_replaced_by_force_alone(folder, capsys):
    build()
    assert "done before" not in capsys.readouterr().err
    build("--workers", "2")
    assert capsys.readouterr().err.count("done before") == 7
    (folder / "build.toml").write_text(CONFIG.replace("per_source = 6", "per_source = 3"))
    with pytest.raises(SystemExit):
        build()
    assert "math_rl, 3 select: out/math_rl/3-select/rows.jsonl exists" in capsys.readouterr().err
    build("--force")
    assert capsys.readouterr().err.count("done before") == 5
    assert len(read(folder / "out" / "math_rl" / "rows.jsonl")) == 6


def test_a_dry_run_shows_the_steps_and_writes_nothing(folder, capsys):
    build("--dry-run")
    assert "2 decontaminate" in capsys.readouterr().out
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('sources = ["first"]', 'sources = ["frist"]', "sft.sources names 'frist', which is none of sources"),
        ('kind = "select"', 'kind = "choose"', "math_rl.steps.kind is 'choose', expected one of 'deduplicate'"),
        ("per_source", "per_sources", "there is no setting math_rl.steps.per_sources"),
        ('"b.jsonl", "c.jsonl"', '"absent.jsonl"', "sources.second: absent.jsonl does not exist"),
        ('against = ["bench.jsonl"]', 'against = ["gone.jsonl"]', "math_rl, 2 decontaminate: --against: gone.jsonl"),
        ('sources = ["first"]', 'sources = ["second"]', "sft, check: out/sft/0-gather/rows.jsonl:1: the row has"),
    ],
)
def test_what_is_refused(folder, capsys, old, new, told):
    (folder / "build.toml").write_text(CONFIG.replace(old, new))
    with pytest.raises(SystemExit):
        build()
    assert told in capsys.readouterr().err


def test_the_folder_of_something_else_is_left_alone(folder, capsys):
    write(folder / "report.json", {"verb": "other"})
    with pytest.raises(SystemExit):
        build("--output", ".")
    assert "report.json is of no build" in capsys.readouterr().err
