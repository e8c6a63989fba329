"""Mistakes that only show once the run has begun: a sentence with the file and the remedy, no traceback, exit code 1.

What existed before is as it was. The table of what is found earlier, without torch, is in tests/unit/test_bad_input.py.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_run import start as start_run
from tiny_run import write_run

from megatron_klear.errors import exit_on_error

Make = Callable[[Path], list[str] | None]


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Make
    told: tuple[str, ...]
    resumed: bool = False
    """Made in the folder of a run that has a checkpoint of step 2."""


def launch(arguments: list[str]) -> tuple[object, str]:
    """What the entry script does, on a rank: exit code and what was printed."""
    from megatron_klear.train import sft

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            with exit_on_error():
                sft.run(start_run(*arguments))
        except SystemExit as error:
            return error.code, out.getvalue()
    return 0, out.getvalue()


def data(text: str) -> Make:
    return lambda folder: void((folder / "train.jsonl").write_text(text))


def flags(*words: str) -> Make:
    return lambda folder: list(words)


def cut(path: str, keep: float) -> Make:
    def make(folder: Path) -> None:
        file = folder / path
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])

    return make


def config_json(**changes: object) -> Make:
    def make(folder: Path) -> None:
        path = folder / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return make


def without_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def no_template(folder: Path) -> None:
    (folder / "model/chat_template.jinja").unlink()


def other_answers(folder: Path) -> None:
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace("7", "8"))


def weights_alone(folder: Path) -> list[str]:
    checkpoint = folder / CHECKPOINT
    return ["--output", str(folder / "other"), "--model.weights", "pretrained", "--model.checkpoint", str(checkpoint)]


def checkpoint_of_another_model(folder: Path) -> list[str]:
    arguments = weights_alone(folder)
    config_json(num_hidden_layers=2)(folder)
    return arguments


def void(_: object) -> None:
    return None


CHECKPOINT = "run/checkpoints/step-00000002"
GOOD_ROW = '{"prompt": "a", "response": "b"}\n'
PRETRAINED = ["--model.weights", "pretrained"]

MISTAKES = [
    Mistake("row is no JSON", data(GOOD_ROW * 2 + '{"prompt": \n'), ("train.jsonl", "3")),
    Mistake("row without a response", data(GOOD_ROW + '{"prompt": "a"}\n'), ("train.jsonl", "2", "response")),
    Mistake("row of another form", data(GOOD_ROW + '["a", "b"]\n'), ("train.jsonl", "2", "messages")),
    Mistake("unknown role", data('{"messages": [{"role": "robot", "content": "a"}]}\n'), ("train.jsonl", "1", "robot")),
    Mistake("content is a number", data('{"prompt": "a", "response": 3}\n'), ("train.jsonl", "1", "response")),
    Mistake("blank data", data("\n\n"), ("train.jsonl",)),
    Mistake("nothing is trained", data('{"messages": [{"role": "user", "content": "a"}]}\n'), ("train.jsonl",)),
    Mistake("all too long", flags("--data.max_length", "3"), ("data.max_length", "train.jsonl")),
    Mistake(
        "over-long is an error", flags("--data.max_length", "40", "--data.overlong", "error"), ("train.jsonl", "40")
    ),
    Mistake("all held out", flags("--data.validation_share", "0.999999"), ("data.validation_share",)),
    Mistake("no chat template", no_template, ("model", "chat_template")),
    Mistake("template is no Jinja", lambda f: template(f, "{% for %}"), ("t.jinja",)),
    Mistake("template marks no answer", lambda f: template(f, "{{ messages[0].content }}"), ("t.jinja",)),
    Mistake("tokenizer damaged", cut("model/tokenizer.json", 0.5), ("model/tokenizer.json cannot be read", "line")),
    Mistake("tokenizer larger than the model", config_json(vocab_size=300), ("vocab_size", "300", "tokenizer")),
    Mistake("weights cut short", lambda f: pretrained(cut("model/model.safetensors", 0.5), f), ("model.safetensors",)),
    Mistake("weights lack a tensor", lambda f: pretrained(without_tensor, f), ("up_proj.weight",)),
    Mistake(
        "weights of another shape",
        lambda f: pretrained(config_json(intermediate_size=128), f),
        ("model.safetensors", "128"),
    ),
    Mistake("model.checkpoint is no checkpoint", lambda f: no_checkpoint(f), ("model", "training.json", "convert")),
    Mistake("model.checkpoint of another model", checkpoint_of_another_model, ("step-00000002",), resumed=True),
    Mistake("seed changed since", flags("--seed", "7"), ("seed: 1234 -> 7", "another output"), resumed=True),
    Mistake("rows changed since", flags("--train.rows_per_step", "4"), ("train.rows_per_step: 2 -> 4",), resumed=True),
    Mistake("data changed since", other_answers, ("position in the data", "content", "model.checkpoint"), resumed=True),
    Mistake("data grown since", data(GOOD_ROW * 200), ("position in the data", "num_samples was 100"), resumed=True),
    Mistake(
        "no checkpoint whole",
        cut(f"{CHECKPOINT}/.metadata", 0.5),
        ("checkpoints is damaged", "step-00000002", ".metadata"),
        resumed=True,
    ),
    Mistake("output below a device", flags("--output", "/proc/run"), ("/proc/run",)),
    Mistake("cache below a device", flags("--data.cache", "/proc/cache"), ("/proc/cache",)),
]


def template(folder: Path, text: str) -> list[str]:
    (folder / "t.jinja").write_text(text)
    return ["--data.chat_template", str(folder / "t.jinja")]


def pretrained(make: Make, folder: Path) -> list[str]:
    make(folder)
    return PRETRAINED


def no_checkpoint(folder: Path) -> list[str]:
    return [*PRETRAINED, "--model.checkpoint", str(folder / "model")]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, ranks) -> Path:
    """A folder with a run of two steps."""
    folder = tmp_path_factory.mktemp("begun") / "here"
    folder.mkdir()
    toml = write_run(folder, weights=True)
    assert ranks(1, launch, [toml, "--train.steps", "2", "--checkpoint.asynchronous", "false"])[0][0] == 0
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_end_the_run_in_words(mistake: Mistake, begun: Path, ranks):
    kept = begun.with_name("kept")
    begun.rename(kept)  # the settings name the folder, so each case works at its place
    shutil.copytree(kept, begun)
    try:
        if not mistake.resumed:
            shutil.rmtree(begun / "run")
            shutil.rmtree(begun / "cache")
        more = mistake.make(begun) or []
        code, told = ranks(1, launch, [begun / "run.toml", *more])[0]
        assert code == 1, told
        for words in mistake.told:
            assert words in told
        assert "Traceback" not in told
        if mistake.resumed:
            assert (begun / CHECKPOINT).is_dir()
            assert (begun / "run/metrics.jsonl").read_bytes() == (kept / "run/metrics.jsonl").read_bytes()
            assert (begun / "run/config.toml").read_bytes() == (kept / "run/config.toml").read_bytes()
    finally:
        shutil.rmtree(begun)
        kept.rename(begun)
