"""Rows that cannot be used, in every verb: each told with file and line, the rest as if they were not there."""

import json

import pytest
from curation_rows import contents, curate, read, sentence, write

from megatron_klear.cli.curate import main
from megatron_klear.data.rows import DataError

BAD = {
    b'{"prompt": "x"': "malformed_json",
    b'{"prompt": NaN}': "malformed_json",
    b"[" * 100_000: "malformed_json",
    b'["a list"]': "wrong_type",
    b'{"prompt": 5, "response": "x"}': "wrong_type",
    b'{"prompt": "x", "data_source": 1, "reward_model": {"ground_truth": "1"}}': "wrong_type",
    b'{"messages": [{"role": "user"}]}': "wrong_type",
    b'{"messages": [{"role": "user", "content": "x", "more": ' + b"[" * 600 + b"]" * 600 + b"}]}": "wrong_type",
    b'{"prompt": "x", "response": "y", "extra_info": ' + b"[" * 600 + b"]" * 600 + b"}": "wrong_type",
    b'{"prompt": "x", "data_source": "made_up", "reward_model": {"ground_truth": '
    + b'{"a":' * 300
    + b"1"
    + b"}" * 302: "wrong_type",
    b'{"prompt": "x"}': "missing_field",
    b'{"prompt": " ", "response": "x"}': "missing_field",
    b'{"prompt": "caf\xe9", "response": "x"}': "bad_encoding",
    b'{"prompt": "\\ud800", "response": "x"}': "bad_encoding",
    b'{"prompt": "' + b"x" * 150_000 + b'", "response": "x"}': "too_large",
}
GOOD = [
    {
        "prompt": f"Problem {k}",
        "data_source": "made_up",
        "reward_model": {"ground_truth": "assert f(1) == 1"},
        "responses": ["Seed"],
    }
    for k in range(len(BAD))
]
VERBS = ("deduplicate", "decontaminate", "select", "filter-code", "filter-pass-rate", "distill")


@pytest.fixture
def arguments(tmp_path, request, verb, light_reward):
    """What a verb needs besides input and output, to keep all rows that are good."""
    if verb == "decontaminate":
        return "--against", write(tmp_path / "bench.jsonl", {"problem": sentence(1, 20)}), "--rule", "careful"
    if verb == "select":
        return "--source", "data_source", "--where", "reward_model.ground_truth=assert f(1) == 1"
    if verb == "filter-code":
        return "--min-tests", 1, "--reward.functions", '{made_up = "code"}'
    if verb == "filter-pass-rate":
        return "--samples", 1, "--responses", write(tmp_path / "responses.jsonl", *GOOD), *light_reward
    if verb == "distill":
        return "--samples", 1, *request.getfixturevalue("teacher").flags()
    return ()


def lines():
    """Each bad line before a good and a blank one."""
    return [line for bad, good in zip(BAD, GOOD, strict=True) for line in (bad, good, b"")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("verb", VERBS)
def test_bad_rows_are_counted_with_their_places_and_the_rest_goes_on(tmp_path, verb, arguments, workers):
    rows = write(tmp_path / "rows.jsonl", *lines())
    output = tmp_path / "out" / "rows.jsonl"
    given = ("--max-row-mib", 0.125, "--workers", workers)
    report = curate(verb, "--input", rows, "--output", output, *given, *arguments)
    if verb == "distill":
        assert [row["messages"][0]["content"] for row in read(output)] == [good["prompt"] for good in GOOD]
    else:
        assert read(output) == GOOD
    assert report["counts"] == {"rows": 2 * len(BAD), "kept": len(GOOD), "dropped": 0, "bad": len(BAD)}
    assert [{"file": str(rows), **report["counts"]}] == report["sources"]
    places = {example["row"]: kind for kind, examples in report["examples"].items() for example in examples}
    assert places == {3 * k + 1: kind for k, kind in enumerate(BAD.values())}
    assert sum(report["bad"].values()) == len(BAD)
    assert all(example["why"] for examples in report["examples"].values() for example in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_strict_stops_with_the_place(tmp_path, verb, arguments):
    rows = write(tmp_path / "rows.jsonl", GOOD[0], b"{", GOOD[1])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not valid JSON"):
        curate(verb, "--input", rows, "--output", tmp_path / "out" / "rows.jsonl", "--strict", *arguments)
    assert not set(contents(tmp_path / "out")) - {"responses.jsonl", "grades.jsonl"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_counts_them_where_they_are_met(tmp_path, workers, capsys):
    rows = write(tmp_path / "rows.jsonl", *lines())
    config = tmp_path / "build.toml"
    config.write_text(
        f'output = "{tmp_path}/out"\nmax_row_mib = 0.125\nworkers = {workers}\n'
        f'sources = [{{ name = "all", files = ["{rows}"] }}]\n'
        '[math_rl]\nsources = ["all"]\nsteps = [{ kind = "deduplicate" }]\n'
    )
    main(["build", "--config", str(config)])
    assert "1 too_large" in capsys.readouterr().err
    gathered, distinct, checked = json.loads((tmp_path / "out" / "report.json").read_bytes())["sets"]["math_rl"][
        "steps"
    ]
    for step in (gathered, distinct):
        assert step["counts"]["rows"] == step["counts"]["kept"] + step["counts"]["bad"]
    assert gathered["counts"]["bad"] + distinct["counts"]["bad"] == len(BAD)
    assert checked["counts"]["kept"] == len(GOOD)
    with pytest.raises(SystemExit):
        main(["build", "--config", str(config), "--force", "--strict", "--workers", "1"])
    assert f"math_rl, gather: {rows}:1: not valid JSON" in capsys.readouterr().err
