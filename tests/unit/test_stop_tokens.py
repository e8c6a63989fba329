"""What ends a response: the template's end of turn beside the model's own, in training, rollouts and saved folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klear.data.rows import read_row
from megatron_klear.data.tiny import tiny_config, write_tiny_model
from megatron_klear.data.tokenizer import ChatTokenizer, load_spec, load_tokenizer
from megatron_klear.mcore.checkpoints.manifest import copy_model_files
from megatron_klear.models.stop_tokens import (
    NamedToken,
    StopTokenError,
    Turns,
    name_turn_end,
    read_stop_tokens,
    stop_tokens,
)
from megatron_klear.train.turn_end import stop_tokens_of, training_notes, turns_of

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_tokenizer"
TURN_END, END_OF_TEXT = NamedToken(509, "<|im_end|>"), NamedToken(507, "<|endoftext|>")
MESSAGES = "{% for message in messages %}{{ message.role + ': ' + message.content "
PROMPT = "}}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TEMPLATES = {
    "own token": (MESSAGES + "+ '<|im_end|>\\n' " + PROMPT, TURN_END),
    "eos": (MESSAGES + "+ eos_token " + PROMPT, TURN_END),
    "another special token": (MESSAGES + "+ '\\n<|endoftext|>' " + PROMPT, END_OF_TEXT),
    "ordinary text": (MESSAGES + "+ '\\n###\\n' " + PROMPT, None),
    "nothing": (MESSAGES + PROMPT, None),
    "refuses": ("{{ raise_exception('no') }}", None),
    "thinking block": (MESSAGES + "if message.role == 'user' else '<think>\\n\\n</think>\\n\\n' + message.content "
                       "}}{{ '<|im_end|>' " + PROMPT, TURN_END),
}  # fmt: skip


def tokenizer_with(template: str) -> ChatTokenizer:
    return ChatTokenizer(replace(load_spec(TINY), template=template))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder like a base model's: a chat template, and another eos than the one that ends its turns."""
    folder = write_tiny_model(tmp_path / "base", weights=False)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change(folder / name, eos_token=END_OF_TEXT.text)
    for name in ("config.json", "generation_config.json"):
        change(folder / name, eos_token_id=END_OF_TEXT.id)
    return folder


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def eos_of(folder: Path) -> list[object]:
    names = ("generation_config.json", "config.json")
    return [json.loads((folder / name).read_text())["eos_token_id"] for name in names]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_end_of_a_turn_is_read_from_the_template(kind: str):
    template, expected = TEMPLATES[kind]
    assert tokenizer_with(template).turn_end == expected


def test_the_end_of_a_turn_is_the_last_token_that_training_trains():
    for template in (load_spec(TINY).template, TEMPLATES["own token"][0], TEMPLATES["another special token"][0]):
        tokenizer = tokenizer_with(template)
        sample = tokenizer.encode_row(read_row({"prompt": "q", "response": "a"}))
        assert sample.trained[-1]
        assert tokenizer.turn_end is not None
        assert sample.tokens[-1] == tokenizer.turn_end.id


@pytest.mark.parametrize(
    ("turn_end", "eos", "generation", "config", "ids", "told"),
    [
        (TURN_END, TURN_END, {"eos_token_id": 509}, {"eos_token_id": 509}, (509,), False),
        (TURN_END, END_OF_TEXT, {"eos_token_id": 507}, {"eos_token_id": 507}, (509, 507), True),
        (TURN_END, END_OF_TEXT, {"eos_token_id": [509, 507]}, {"eos_token_id": 507}, (509, 507), False),
        (TURN_END, END_OF_TEXT, {}, {}, (509, 507), True),
        (TURN_END, None, {}, {"eos_token_id": None}, (509,), True),
        (TURN_END, TURN_END, {"eos_token_id": [3, 4]}, {"eos_token_id": 5}, (509, 3, 4, 5), False),
        (None, END_OF_TEXT, {"eos_token_id": 508}, {}, (508, 507), True),
        (None, None, {}, {}, (), True),
    ],
)
def test_every_end_that_is_named_ends_a_response(turn_end, eos, generation, config, ids, told):
    found = stop_tokens(turn_end=turn_end, tokenizer_eos=eos, generation_config=generation, config=config)
    assert found.ids == ids
    assert found.turn_end == (turn_end.id if turn_end else None)
    assert bool(found.note) == told


@pytest.mark.parametrize("named", ["509", 509.0, True, [509, None], -1, {}])
def test_an_end_that_is_no_token_id_is_refused(named: object):
    with pytest.raises(StopTokenError, match=r"config\.json: eos_token_id"):
        stop_tokens(turn_end=None, tokenizer_eos=None, generation_config={}, config={"eos_token_id": named})


def test_a_base_model_is_told_and_its_saved_folder_names_both(base: Path, tmp_path: Path):
    tokenizer = load_tokenizer(base)
    found = stop_tokens_of(base, tokenizer)
    assert found.ids == (509, 507)
    (note,) = training_notes(tokenizer, found)
    assert "<|im_end|> (509)" in note
    assert "<|endoftext|> (507)" in note
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    copy_model_files(base, tmp_path / "saved", Turns(end=found.turn_end))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert eos_of(tmp_path / "saved") == [[509, 507], [509, 507]]
    again = stop_tokens_of(tmp_path / "saved", load_tokenizer(tmp_path / "saved"))
    assert (again.ids, again.note) == ((509, 507), "")


def test_a_saved_folder_has_the_template_it_was_trained_with(base: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    copy_model_files(base, tmp_path / "saved", turns_of(stop_tokens_of(base, load_tokenizer(base, mine)), mine))
    messages = [{"role": "user", "content": "hi"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(messages, tokenize=False) == "[hi]"
    assert load_tokenizer(tmp_path / "saved").template.name.startswith("the chat template of")


def test_saved_folders_are_what_transformers_reads(base: Path):
    from transformers import AutoConfig, GenerationConfig

    name_turn_end(base, 509)
    assert GenerationConfig.from_pretrained(base).eos_token_id == [509, 507]
    assert AutoConfig.from_pretrained(base).eos_token_id == [509, 507]


def test_files_that_name_the_end_stay_as_they_are(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "model", weights=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name_turn_end(folder, 509)
    name_turn_end(folder, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_missing_generation_config_is_written(tmp_path: Path):
    config = tiny_config("llama") | {"eos_token_id": 507}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name_turn_end(tmp_path, 509)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"eos_token_id": [509, 507], "pad_token_id": 507}
    assert json.loads((tmp_path / "config.json").read_text()) == config | {"eos_token_id": [509, 507]}


def test_damaged_settings_are_refused_by_name(base: Path):
    (base / "generation_config.json").write_text("{")
    with pytest.raises(StopTokenError, match=r"generation_config\.json is not valid JSON"):
        read_stop_tokens(base, turn_end=TURN_END, tokenizer_eos=None)


def test_an_end_outside_the_generation_block_is_told():
    template = (
        "{% for message in messages %}{{ message.role + ': ' }}{% generation %}{{ message.content }}{% endgeneration %}"
        "{{ '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    assert tokenizer.turn_end == TURN_END
    (note,) = training_notes(tokenizer, stop_tokens_of(TINY, tokenizer))
    assert "outside its generation block" in note


def test_the_base_form_of_qwen3(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "tokenizer_qwen3")
    found = stop_tokens(
        turn_end=tokenizer.turn_end,
        tokenizer_eos=NamedToken(151643, "<|endoftext|>"),
        generation_config={"eos_token_id": 151643},
        config={"eos_token_id": 151643},
    )
    assert found.ids == (151645, 151643)
    assert "<|im_end|> (151645)" in found.note
