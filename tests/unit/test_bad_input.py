"""Every mistake a person can make ends early, with exit code 2 and a sentence that names what is wrong and the remedy.

A row of the table is a name, a function that makes the mistake in a good run's folder and may return more flags, and
what the message must say. Add a row for each new kind of mistake; `run` may be replaced for those that only a later
stage can find.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_klear.config.start import start_sft

GOOD_TOML = """
output = "run"
[model]
path = "model"
[data]
train = ["train.jsonl"]
[logging]
tensorboard = false
"""

GOOD_MODEL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
}

Make = Callable[[Path], list[str] | None]
Run = Callable[[list[str]], object]


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Make
    told: tuple[str, ...]
    run: Run = start_sft
    world_size: int = 1


def toml(extra: str = "", *, replace: tuple[str, str] = ("", "")) -> Make:
    return lambda folder: void((folder / "run.toml").write_text(GOOD_TOML.replace(*replace) + extra))


def flags(*words: str) -> Make:
    return lambda folder: list(words)


def model(**changes: object) -> Make:
    return lambda folder: void((folder / "model/config.json").write_text(json.dumps(GOOD_MODEL | changes)))


def model_without(key: str) -> Make:
    rest = {k: v for k, v in GOOD_MODEL.items() if k != key}
    return lambda folder: void((folder / "model/config.json").write_text(json.dumps(rest)))


def write(path: str, text: str) -> Make:
    return lambda folder: void((folder / path).write_text(text))


def remove(path: str) -> Make:
    return lambda folder: (folder / path).unlink()


def void(_: object) -> None:
    return None


SETTINGS = [
    Mistake("no config", lambda f: remove("run.toml")(f), ("run.toml: there is no such file", "current directory")),
    Mistake("toml syntax", toml("[train\n"), ("run.toml: not valid TOML", "line 9")),
    Mistake("unquoted text", toml("[train]\naggregation = token_mean\n"), ("not valid TOML", "line 10", "quotes")),
    Mistake("toml is not text", lambda f: void((f / "run.toml").write_bytes(b"\xff\xfe\x00")), ("run.toml", "as text")),
    Mistake("unknown key", toml("[train]\nepoch = 1\n"), ("run.toml:10", "train.epoch", "mean train.epochs")),
    Mistake("unknown table", toml("[optim]\nlr = 1\n"), ("there is no setting optim", "mean optimizer")),
    Mistake("key in wrong table", toml("[train]\nwarmup_steps = 1\n"), ("mean optimizer.warmup_steps",)),
    Mistake("unknown flag", flags("--train.step", "1"), ("--train.step", "mean train.steps")),
    Mistake("stray word", flags("--seed", "1", "2", "--x"), ("--seed", "expected a whole number", "--x")),
    Mistake("text for number", toml('[train]\nepochs = "1"\n'), ("run.toml:10: train.epochs", '"1"', "whole number")),
    Mistake("fraction for count", flags("--train.epochs", "1.5"), ("--train.epochs", '"1.5"', "whole number")),
    Mistake("zero rows", flags("--train.rows_per_step", "0"), ("train.rows_per_step is 0", "above 0")),
    Mistake("number for switch", toml("[optimizer]\noverlap = 1\n"), ("optimizer.overlap is 1", "true or false")),
    Mistake("unknown choice", flags("--model.dtype", "fp16"), ('model.dtype is "fp16"', '"bf16", "fp32"')),
    Mistake("text for list", toml(replace=('["train.jsonl"]', '"train.jsonl"')), ("data.train", "a list of texts")),
    Mistake("empty list", toml(replace=('["train.jsonl"]', "[]")), ("data.train is an empty list", "at least 1")),
    Mistake("infinite rate", toml("[optimizer]\nlearning_rate = inf\n"), ("optimizer.learning_rate", "a number")),
    Mistake("missing key", toml(replace=('path = "model"', "")), ("model.path", "required", "--model.path")),
    Mistake("missing table", toml(replace=('[data]\ntrain = ["train.jsonl"]', "")), ("data.train", "required")),
    Mistake("table as value", toml(replace=('[model]\npath = "model"', 'model = "m"')), ("a table [model]",)),
    Mistake("crossed rates", flags("--optimizer.min_learning_rate", "1"), ("min_learning_rate 1.0 is above",)),
    Mistake("sample above row", flags("--data.max_length", "99999"), ("data.max_length 99999", "fit in one row")),
    Mistake("chunks without pipeline", flags("--parallel.virtual_pipeline", "2"), ("needs parallel.pipeline > 1",)),
    Mistake("dry run of nothing", flags("--dry-run=many"), ("--dry-run=many", "--dry-run=64")),
]

MODEL = [
    Mistake("no model folder", flags("--model.path", "nowhere"), ("nowhere/config.json", "model.path")),
    Mistake("config.json damaged", write("model/config.json", '{"model_type": '), ("config.json", "not valid JSON")),
    Mistake("unknown family", model(model_type="mamba"), ("model_type 'mamba'", "qwen3, qwen2, llama")),
    Mistake("config.json lacks a key", model_without("hidden_size"), ("config.json: hidden_size", "a number")),
    Mistake("sliding window", model(use_sliding_window=True), ("use_sliding_window", "set it to false")),
    Mistake("no weights", remove("model/model.safetensors"), ("no *.safetensors", "model.weights = random")),
    Mistake("no tokenizer", remove("model/tokenizer.json"), ("model.path", "tokenizer.json")),
    Mistake("no checkpoint", flags("--model.checkpoint", "gone"), ("model.checkpoint gone", "no such folder")),
]

LAYOUT = [
    Mistake("heads", flags("--parallel.tensor", "8"), ("parallel.tensor 8", "num_attention_heads 4"), world_size=8),
    Mistake(
        "key/value heads",
        flags("--parallel.tensor", "4"),
        ("parallel.tensor 4", "num_key_value_heads 2; use 1, 2"),
        world_size=4,
    ),
    Mistake("world size", flags("--parallel.tensor", "2"), ("3 processes", "a multiple of 2"), world_size=3),
    Mistake("layers", flags("--parallel.pipeline", "3"), ("num_hidden_layers 4", "parallel.pipeline 3"), world_size=3),
    Mistake("rows over ranks", flags("--train.rows_per_step", "3"), ("rows_per_step 3", "use 2 or 4"), world_size=2),
    Mistake(
        "uneven interleaving",
        flags("--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2", "--train.rows_per_step", "3"),
        ("parallel.virtual_pipeline 2", "a multiple of 2"),
        world_size=2,
    ),
    Mistake("fp8 on the cpu", flags("--model.fp8", "hybrid", "--parallel.device", "cpu"), ("model.fp8", "needs a GPU")),
    Mistake("flash on the cpu", flags("--model.attention", "flash", "--parallel.device=cpu"), ("use auto or sdpa",)),
]

FILES = [
    Mistake("no data", remove("train.jsonl"), ("data.train: train.jsonl does not exist",)),
    Mistake("empty data", write("train.jsonl", ""), ("data.train: train.jsonl is empty",)),
    Mistake("data of another kind", flags("--data.train", "run.toml"), ("data.train: run.toml", ".jsonl nor .parquet")),
    Mistake("glob without match", flags("--data.validation", "v*.jsonl"), ("data.validation: no file matches",)),
    Mistake("no template", flags("--data.chat_template", "t.jinja"), ("data.chat_template t.jinja", "leave it out")),
    Mistake("output is a file", write("run", "mine"), ("output run", "is a file")),
]


@pytest.fixture
def good_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which a run would start, made the current directory."""
    (tmp_path / "run.toml").write_text(GOOD_TOML)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(GOOD_MODEL))
    (tmp_path / "model/tokenizer.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_good_run_starts(good_run: Path):
    start = start_sft(["--config", "run.toml"])
    assert start.architecture.num_layers == 4
    assert start.warnings == ()


@pytest.mark.parametrize("mistake", [*SETTINGS, *MODEL, *LAYOUT, *FILES], ids=lambda mistake: mistake.name)
def test_mistakes_are_named(mistake: Mistake, good_run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    more = mistake.make(good_run) or []
    monkeypatch.setenv("WORLD_SIZE", str(mistake.world_size))
    before = contents(good_run)
    with pytest.raises(SystemExit) as caught:
        mistake.run(["--config", "run.toml", *more])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    for words in mistake.told:
        assert words in shown
    for jargon in ("Traceback", "pydantic", "http", "Input should"):
        assert jargon not in shown
    assert contents(good_run) == before


def test_unwritable_output_is_named(good_run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK | os.X_OK)
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", "run.toml"])
    assert caught.value.code == 2
    assert "output run" in (shown := capsys.readouterr().err)
    assert "cannot be written" in shown


def test_a_process_ends_with_2_and_no_traceback(good_run: Path):
    code = "from megatron_klear.config.start import start_sft; start_sft()"
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", code, "--config", "run.toml", "--train.step", "1"],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        "error: 1 problem, nothing was started:",
        "  - --train.step: there is no setting train.step; did you mean train.steps?",
    ]


def test_dry_run_prints_the_plan_and_ends_well(good_run: Path, capsys):
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", "run.toml", "--dry-run=4", "--parallel.tensor", "2"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "tensor 2 x pipeline 1 x context 1 x data 2" in shown
    assert "total" in shown


def test_dry_run_plans_for_a_cluster_and_names_what_this_machine_lacks(good_run: Path, capsys):
    (good_run / "train.jsonl").unlink()
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", "run.toml", "--dry-run"])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "optimizer state" in shown.out
    assert "data.train" in shown.err


def test_a_plan_for_processes_elsewhere_ends_well_where_only_files_are_missing(good_run: Path, capsys):
    (good_run / "train.jsonl").unlink()
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", "run.toml", "--dry-run=4"])
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert "this machine lacks" in shown.out
    assert "data.train" in shown.out.partition("this machine lacks")[2]
    assert shown.err == ""


def test_only_arithmetic_mistakes_withhold_the_plan(good_run: Path, capsys):
    with contextlib.suppress(SystemExit):
        start_sft(["--config", "run.toml", "--dry-run=3", "--parallel.tensor", "2"])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3 processes" in shown.err
