"""Settings: file, flags, defaults, errors in words, and the resolved file that loads back to the same run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from megatron_klear.config import read
from megatron_klear.config.base import LoraConfig, Settings, SFTConfig
from megatron_klear.config.read import (
    SettingsError,
    differences,
    exit_on_bad_input,
    help_text,
    load,
    parse_command_line,
    write_resolved,
)
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.schema import keys_of, nearest_key

MINIMAL = """
output = "runs/x"
[model]
path = "models/m"
[data]
train = ["a.jsonl"]
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, *flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(SFTConfig, ["--config", str(path), *flags])
    return str(caught.value)


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda t: t not in ("none", "", "."))
overrides = st.fixed_dictionaries(
    {
        "output": text,
        "seed": st.integers(0, 2**63 - 1),
        "model": st.fixed_dictionaries(
            {"path": text}, optional={"checkpoint": text, "dtype": st.sampled_from(["bf16", "fp32"])}
        ),
        "data": st.fixed_dictionaries({"train": st.lists(text, min_size=1, max_size=3)}),
        "train": st.fixed_dictionaries({}, optional={"steps": st.integers(1, 10**9)}),
        "optimizer": st.fixed_dictionaries(
            {"min_learning_rate": st.just(0.0)},
            optional={"learning_rate": st.floats(0, 1e300), "overlap": st.booleans()},
        ),
        "logging": st.fixed_dictionaries({}, optional={"wandb_project": text, "peak_tflops": st.floats(1e-3, 1e9)}),
    }
)


@given(overrides)
@hypothesis_settings(max_examples=60, deadline=None)
def test_resolved_settings_load_back_to_the_same_config(tmp_path_factory, values):
    config = SFTConfig.model_validate(values)
    path = tmp_path_factory.mktemp("resolved") / "resolved.toml"
    write_resolved(config, path)
    assert load(SFTConfig, ["--config", str(path)]) == config
    assert differences(path, config) == []


@given(st.lists(st.sampled_from(["--a", "--a=1", "x", "--config", "--optimizer.lr", "[", "{", "--data.train", "none"])))
@hypothesis_settings(max_examples=80, deadline=None)
def test_any_command_line_is_a_config_or_a_settings_error(tmp_path_factory, argv):
    path = tmp_path_factory.mktemp("any") / "run.toml"
    path.write_text(MINIMAL)
    try:
        config, told = load(SFTConfig, ["--config", str(path), *argv]), ""
    except SettingsError as error:
        config, told = None, str(error)
    assert (config is None) == bool(told)
    assert "pydantic" not in told


def test_every_key_can_be_given_as_a_flag_with_its_default(toml: Path):
    config = load(SFTConfig, ["--config", str(toml)])
    flags = []
    for key in keys_of(SFTConfig).values():
        # A key of this table brings the table in, and with it adapters.
        if not key.required and key.default != () and not key.name.startswith("lora."):
            word = "none" if key.default is None else str(key.default)
            word = json.dumps(key.default) if isinstance(key.default, tuple) else word
            flags += [f"--{key.name}", word.lower() if isinstance(key.default, bool) else word]
    assert load(SFTConfig, ["--config", str(toml), *flags]) == config
    assert config.lora is None
    assert load(SFTConfig, ["--config", str(toml), "--lora.targets", "all"]).lora == LoraConfig()


def test_flags_override_the_file(toml: Path):
    config = load(
        SFTConfig,
        [
            *("--config", str(toml), "--optimizer.learning_rate", "2e-6", "--train.rows_per_step=4"),
            *("--data.train", "b.jsonl", "c.jsonl", "--model.fused_loss", "false", "--data.packing"),
            *("--train.steps", "none", "--data.validation", '["v.jsonl"]', "--seed", "1", "--seed", "2"),
        ],
    )
    assert config.optimizer.learning_rate == 2e-6
    assert config.train.rows_per_step == 4
    assert config.data.train == ("b.jsonl", "c.jsonl")
    assert config.data.validation == ("v.jsonl",)
    assert config.model.fused_loss is False
    assert config.data.packing is True
    assert config.train.steps is None
    assert config.seed == 2


def test_dashes_in_flags_are_underscores_and_dry_run_is_told(toml: Path):
    command = parse_command_line(SFTConfig, ["--config", str(toml), "--dry-run", "--optimizer.learning-rate", "1"])
    assert command.dry_run
    assert command.config.optimizer.learning_rate == 1.0
    assert not parse_command_line(SFTConfig, ["--config", str(toml)]).dry_run


def test_all_problems_are_reported_together_with_their_lines(toml: Path):
    toml.write_text(MINIMAL + '[train]\nrows_per_step = "8"\nlearning_rate = 1\n[model.extra]\nx = 1\n')
    message = problems(toml, "--optimizer.beta1", "x", "--optimiser.lr=3", "stray")
    assert "stray" in message
    toml.write_text(MINIMAL + '[train]\nrows_per_step = "8"\nlearning_rate = 1\n')
    message = problems(toml, "--optimizer.beta1", "x", "--optimiser.lr=3")
    assert f'{toml}:8: train.rows_per_step is "8", expected a whole number above 0' in message
    assert f"{toml}:9: there is no setting train.learning_rate; did you mean optimizer.learning_rate?" in message
    assert '--optimizer.beta1: optimizer.beta1 is "x", expected a number of at least 0 and below 1' in message
    assert "--optimiser.lr: there is no setting optimiser.lr; did you mean optimizer.learning_rate?" in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sed", "seed"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("parallel.tensor_parallel", "parallel.tensor"),
        ("data.path", "model.path"),
        ("zzzzqqqq", None),
    ],
)
def test_nearest_key(typed: str, meant: str | None):
    assert nearest_key(typed, keys_of(SFTConfig)) == meant


class _Ppo(Settings):
    kind: Literal["ppo"] = "ppo"
    clip: float = 0.2


class _Gppo(Settings):
    kind: Literal["gppo"] = "gppo"
    beta_low: float = 1.0


class _Choice(Settings):
    loss: _Ppo | _Gppo = Field(default=_Gppo(), discriminator="kind")
    parts: tuple[_Ppo, ...] = ()


def test_a_choice_of_tables_is_read_and_explained(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text('[loss]\nkind = "gppo"\nbeta_low = 0.5\n[[parts]]\nclip = 0.1\n')
    config = load(_Choice, ["--config", str(path)])
    assert config.loss == _Gppo(beta_low=0.5)
    assert config.parts == (_Ppo(clip=0.1),)
    assert load(_Choice, ["--config", str(path), "--loss.beta_low", "2"]).loss == _Gppo(beta_low=2)
    write_resolved(config, tmp_path / "resolved.toml")
    assert load(_Choice, ["--config", str(tmp_path / "resolved.toml")]) == config
    for flag, value, told in [
        ("--loss.kind", "ppo", "loss.beta_low"),
        ("--loss.kind", "grpo", "'ppo', 'gppo'"),
        ("--loss.beta_low", "much", 'loss.beta_low is "much", expected a number'),
        ("--parts", "[3]", "parts"),
    ]:
        with pytest.raises(SettingsError, match=told):
            load(_Choice, ["--config", str(path), flag, value])


def test_help_documents_every_setting():
    shown = help_text(SFTConfig, "Fine-tune.")
    for key in keys_of(SFTConfig).values():
        assert f"--{key.name} " in shown
        assert key.doc.split(" ")[0] in shown
    assert "(required)" in shown


def test_help_and_errors_end_the_process_with_0_and_2(toml: Path, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(SFTConfig, ["--help"])
    assert caught.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parse_command_line(SFTConfig, ["--config", str(toml), "--nothing", "1"])
    assert caught.value.code == 2
    assert "Traceback" not in (shown := capsys.readouterr().err)
    assert "--nothing" in shown


class Ended(Exception):
    """What torchrun does to the others when the first of a machine has left."""


def test_only_the_first_rank_of_a_machine_speaks(monkeypatch, capsys):
    def end(seconds: float) -> None:
        raise Ended

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(read.time, "sleep", end)
    with pytest.raises(Ended), exit_on_bad_input():
        raise SettingsError(["x"])
    assert capsys.readouterr().err == ""


def test_a_rank_that_is_refused_alone_speaks_for_itself(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(read, "SPEAKER_SECONDS", 0.0)
    with pytest.raises(SystemExit), exit_on_bad_input():
        raise SettingsError(["x"])
    assert "  - x" in capsys.readouterr().err


def test_differences_name_what_changed_and_what_breaks_a_resume(toml: Path, tmp_path: Path):
    old = tmp_path / "resolved.toml"
    write_resolved(load(SFTConfig, ["--config", str(toml)]), old)
    new = load(
        SFTConfig,
        [
            *("--config", str(toml), "--optimizer.learning_rate", "1", "--data.train", "z", "--data.workers", "3"),
            *("--parallel.tensor", "2", "--train.rows_per_step", "2"),
        ],
    )
    found = {str(d): d.breaks_resume for d in differences(old, new)}
    assert found == {
        "parallel.tensor: 1 -> 2": False,
        "optimizer.learning_rate: 8e-05 -> 1.0": False,
        'data.train: ["a.jsonl"] -> ["z"]': True,
        "data.workers: 0 -> 3": False,
        "train.rows_per_step: 8 -> 2": True,
    }
    with pytest.raises(SettingsError, match="no such file"):
        differences(tmp_path / "absent.toml", new)


def test_resolved_file_is_whole_or_absent(tmp_path: Path, toml: Path, monkeypatch):
    path = tmp_path / "resolved.toml"
    path.write_text("kept = 1\n")
    config = load(SFTConfig, ["--config", str(toml)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_resolved(config, path)
    assert path.read_text() == "kept = 1\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resolved.toml", "run.toml"]


def test_config_is_frozen(toml: Path):
    config = load(SFTConfig, ["--config", str(toml)])
    with pytest.raises(ValidationError):
        config.seed = 3


def test_reading_settings_imports_no_torch():
    code = "import sys, megatron_klear.config.base, megatron_klear.config.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


QUICKSTART = str(Path(__file__).resolve().parents[2] / "examples" / "quickstart_gppo.toml")


def gppo(*flags: str) -> GPPOConfig:
    return load(GPPOConfig, ["--config", QUICKSTART, *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--prompts.sources", '[{files = ["x"]}]'), [("x",)]),
        (("--prompts.sources", '[{"files": ["x"]}]'), [("x",)]),
        (("--prompts.sources", '{files = ["x"]}', "{files = ['y', 'z']}"), [("x",), ("y", "z")]),
    ],
)
def test_a_flag_takes_a_list_of_tables_as_the_file_does(flags: tuple[str, ...], expected: list[tuple[str, ...]]):
    assert [source.files for source in gppo(*flags).prompts.sources] == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--reward.functions.gsm8k", "m:f"), {"gsm8k": "m:f"}),
        (("--reward.functions.gsm8k=m:f", "--reward.functions.my-data", "m:g"), {"gsm8k": "m:f", "my-data": "m:g"}),
        (("--reward.functions.openai/gsm8k", "math"), {"openai/gsm8k": "math"}),
        (("--reward.functions.'a.b=c'=m:f",), {"a.b=c": "m:f"}),
        (("--reward.functions", '{"openai/gsm8k" = "math"}'), {"openai/gsm8k": "math"}),
        (("--reward.functions.x", '"m:f"'), {"x": "m:f"}),
        (("--reward.functions.x", "1"), {"x": "1"}),
    ],
)
def test_a_flag_names_an_entry_of_a_free_table(flags: tuple[str, ...], expected: dict[str, str]):
    assert gppo(*flags).reward.functions == expected


@pytest.mark.parametrize(
    ("words", "expected"), [(["509"], (509,)), (["509", "2"], (509, 2)), (["[509, 0x2]"], (509, 2)), (["[]"], ())]
)
def test_plain_values_of_a_list_need_no_brackets(words: list[str], expected: tuple[int, ...]):
    assert gppo("--sampling.stop_token_ids", *words).sampling.stop_token_ids == expected


def test_a_table_given_whole_replaces_the_files_and_later_flags_go_on_from_it():
    loss = gppo("--loss", '{kind = "ppo"}', "--loss.clip-high", "0.3").loss
    assert (loss.kind, loss.clip_high) == ("ppo", 0.3)
    replaced = gppo("--loss.clip_high", "0.3", "--loss", '{kind = "ppo"}').loss
    assert (replaced.kind, replaced.clip_high) == ("ppo", gppo("--loss", '{kind = "ppo"}').loss.clip_high)
    assert replaced.clip_high != 0.3


def test_a_glob_that_begins_with_a_bracket_is_no_list(toml: Path):
    assert load(SFTConfig, ["--config", str(toml), "--data.train", "[ab].jsonl"]).data.train == ("[ab].jsonl",)
    assert load(SFTConfig, ["--config", str(toml), '--output="a b"']).output == Path("a b")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--prompts.sources", "[{files = [x]}]"), "--prompts.sources: [{files = [x]}] is neither TOML nor JSON"),
        (
            ("--prompts.sources", '[{flies = ["x"]}]'),
            "--prompts.sources: there is no setting prompts.sources.flies; did you mean prompts.sources.files?",
        ),
        (("--prompts.sources.files", "x"), "--prompts.sources '[{files = ...}]'"),
        (("--prompts.sources", "x"), 'prompts.sources is "x", expected a list of tables'),
        (("--reward.function.gsm8k", "m:f"), "did you mean reward.functions.gsm8k?"),
        (("--sampling.stop_token_ids", "x"), 'sampling.stop_token_ids is "x", expected a list of whole numbers'),
        (("--sampling.stop_token", "5"), "did you mean sampling.stop_token_ids?"),
        (("--loss", "ppo"), "loss is a table of settings; set one of them, such as --loss."),
        (("--rollout.server", "{count = 2}"), "rollout.server is no setting of the kind that rollout.kind chooses"),
        (("--rollout.servers", "x"), "rollout.servers is no setting of the kind that rollout.kind chooses"),
    ],
)
def test_a_flag_that_cannot_be_used_is_explained(flags: tuple[str, ...], told: str):
    with pytest.raises(SettingsError, match=re.escape(told)):
        gppo(*flags)
