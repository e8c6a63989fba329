"""Raw data sets to rows, and the tools that prepare and show them."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.data.prepare import gsm8k_rows, math_rows, write_rows
from megatron_klear.data.rows import DataError, read_row

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_tokenizer"


def tool(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_klear.cli.{name}")


@given(seed=st.integers(0, 2**32), terms=st.integers(2, 5), digits=st.integers(1, 5))
def test_arithmetic_is_right_and_repeats(seed: int, terms: int, digits: int) -> None:
    rows = list(arithmetic_rows(5, seed=seed, terms=terms, digits=digits))
    assert rows == list(arithmetic_rows(5, seed=seed, terms=terms, digits=digits))
    for row in rows:
        expression = re.search(r"\d+( [-+*] \d+)+", row["prompt"][0]["content"])
        assert expression is not None
        answer = row["reward_model"]["ground_truth"]
        assert eval(expression.group()) == int(answer)
        for step in row["response"].split("<think>\n")[1].split("\n</think>")[0].splitlines():
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert row["response"].endswith(f"\\boxed{{{answer}}}.")


@pytest.mark.parametrize("arguments", [{"count": -1}, {"count": 1, "terms": 1}, {"count": 1, "digits": 0}])
def test_impossible_arithmetic_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="arithmetic rows need"):
        list(arithmetic_rows(**arguments))


def test_gsm8k_row(tmp_path: Path) -> None:
    raw = {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24.\nSo $<<24*100=2400>>2400.\n#### 2,400"}
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps(raw) + "\n\n")
    (row,) = gsm8k_rows(path)
    assert row["response"] == "<think>\nHe has 48/2 = 24.\nSo $2400.\n</think>\n\nThe answer is \\boxed{2400}."
    assert row["reward_model"]["ground_truth"] == "2400"
    assert row["prompt"][0]["content"].startswith("How many? ")


def test_all_of_gsm8k(shared_data: Path) -> None:
    rows = list(gsm8k_rows(shared_data / "gsm8k" / "train.jsonl"))
    assert len(rows) == 7473
    assert not any("<<" in row["response"] or "####" in row["response"] for row in rows)
    for row in rows:
        float(row["reward_model"]["ground_truth"])
        read_row(row)


@pytest.mark.parametrize(
    ("name", "count", "with_response"),
    [
        ("math/math_train_7474.json", 7470, False),
        ("math/math500_test.json", 500, True),
        ("math/amc.json", 83, False),
        ("long_cot/sample_openrouter_outputs.json", 5, True),
    ],
)
def test_math_files(shared_data: Path, name: str, count: int, with_response: bool) -> None:
    rows = list(math_rows(shared_data / name))
    assert len(rows) == count
    assert all(("response" in row) == with_response for row in rows)
    assert all(row["reward_model"]["ground_truth"] for row in rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "q"}', "raw:1: expected an object"),
        ('{"question": "q", "answer": "no result"}', "raw:1: `answer` has no result"),
        ("[", "raw:1: expected an object"),
    ],
)
def test_bad_gsm8k_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "raw").write_text(content)
    with pytest.raises(DataError, match=words):
        list(gsm8k_rows(tmp_path / "raw"))


@pytest.mark.parametrize("content", ["{", "{}", '[{"problem": "p"}]', '["p"]'])
def test_bad_math_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "raw").write_text(content)
    with pytest.raises(DataError, match="raw"):
        list(math_rows(tmp_path / "raw"))


def test_answers_become_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = ["\\frac{1}{2}", 25.0, 2.5, ["a", "b"], 7, None]
    (tmp_path / "raw").write_text(json.dumps([{"problem": "p", "answer": answer} for answer in answers]))
    rows = list(math_rows(tmp_path / "raw"))
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["\\frac{1}{2}", "25", "2.5", "a", "7"]
    assert "entry 6 has no answer" in caplog.text


def test_existing_output_survives(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        write_rows(arithmetic_rows(1), output)

    def broken() -> Any:
        yield {"a": 1}
        raise DataError("half way")

    with pytest.raises(DataError, match="half way"):
        write_rows(broken(), output, force=True)
    assert output.read_text() == "mine"
    assert write_rows(arithmetic_rows(5), output, force=True, limit=3) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_committed_rows_are_what_the_tool_writes(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert tool("prepare_data").main(["arithmetic", "--count", "600", "--output", str(output)]) == 0
    assert output.read_bytes() == (ROOT / "examples" / "data" / "arithmetic_600.jsonl").read_bytes()


def test_prepare_refuses_with_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gsm8k", "--input", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]
    assert tool("prepare_data").main(arguments) == 1
    assert "absent" in capsys.readouterr().err


def test_make_tiny_model_refuses_with_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = tool("make_tiny_model").main
    assert make(["--output", str(tmp_path / "model"), "--no-weights", "--layers", "2"]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 2
    assert make(["--output", str(tmp_path / "model"), "--no-weights"]) == 1
    assert "--force" in capsys.readouterr().err


def test_inspect_marks_trained_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.toml"
    rows = ROOT / "examples" / "data" / "gsm8k_test_100.jsonl"
    run.write_text(f'[model]\npath = "{TINY}"\n[data]\ntrain = ["{rows}"]\ncache = "{tmp_path / "cache"}"\n')
    inspect = tool("inspect_data").main
    assert inspect(["--config", str(run), "--index", "1"]) == 0
    from_config = capsys.readouterr().out
    assert re.search(r"assistant\n⟦<think>\n.*</think>\n\nThe answer is \\boxed\{3\}\.<\|im_end\|>⟧", from_config, re.S)
    assert "100 rows: 100 samples" in from_config
    assert inspect(["--data", str(rows), "--tokenizer", str(TINY), "--index", "1"]) == 0
    assert capsys.readouterr().out == from_config
    assert inspect(["--config", str(run), "--tokens"]) == 0
    assert "* '<think>'" in capsys.readouterr().out


def test_inspect_refuses_with_exit_code_one(capsys: pytest.CaptureFixture[str]) -> None:
    inspect = tool("inspect_data").main
    for arguments, words in (
        ([], "--config"),
        (["--data", "absent.jsonl", "--tokenizer", str(TINY)], "absent.jsonl does not exist"),
        (["--config", "absent.toml"], "absent.toml"),
    ):
        assert inspect(arguments) == 1
        assert words in capsys.readouterr().err


def test_slips_change_worked_answers_and_nothing_else() -> None:
    true, slipped = (list(arithmetic_rows(400, seed=3, slip_share=share)) for share in (0.0, 0.4))
    assert [row["prompt"] for row in true] == [row["prompt"] for row in slipped]
    assert [row["reward_model"] for row in true] == [row["reward_model"] for row in slipped]
    wrong = [f"\\boxed{{{row['reward_model']['ground_truth']}}}" not in row["response"] for row in slipped]
    assert 0.4 < sum(wrong) / len(wrong) < 0.7  # two or three numbers: 0.4 or up to 0.64


def test_excluded_prompts_are_left_out(tmp_path: Path) -> None:
    held_out, kept = tmp_path / "held_out.jsonl", tmp_path / "kept.jsonl"
    prepare = tool("prepare_data").main
    common = ["arithmetic", "--terms", "2", "--digits", "1", "--operators=+-"]
    assert prepare([*common, "--count", "50", "--seed", "1", "--output", str(held_out)]) == 0
    assert prepare([*common, "--count", "2000", "--output", str(kept), "--exclude", str(held_out)]) == 0
    prompts = [{json.loads(line)["prompt"][0]["content"] for line in path.open()} for path in (held_out, kept)]
    assert len(prompts[0]) > 30
    assert len(prompts[1]) > 400
    assert not prompts[0] & prompts[1]
    assert not any("*" in prompt for prompt in prompts[1])
