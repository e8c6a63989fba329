"""The tokenizer that trains is the folder's tokenizer.json; what stands beside it agrees, or is refused."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_klear.data.rows import DataError
from megatron_klear.data.tokenizer import load_spec, load_tokenizer
from megatron_klear.data.tokenizer_files import tokenizer_files
from megatron_klear.mcore.checkpoints.manifest import copy_model_files

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_tokenizer"
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def folder_of(path: Path, *, tokenizer: Tokenizer | None = None, **settings: object) -> Path:
    """A tokenizer folder with a template that ends turns in <|im_end|>, and these settings."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TINY / "tokenizer.json", path / "tokenizer.json")
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PLAIN} | settings))
    return path


@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_tokens_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path: Path, cls: str, model_type: str) -> None:
    """Digits are split before bytes, as SmolLM2 does; transformers drops that for some of these classes."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace("\u2019", "'")
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    corpus = ["He said.\n\nStep two.\n\n1. First\n\n2. Second\n    12\n    34\n"] * 50
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    folder = folder_of(tmp_path, tokenizer=made, tokenizer_class=cls, eos_token="<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = load_tokenizer(folder)
    for text in ("Step two.\n\n2. Second", "\n    12", "He said", "it\u2019s e\u0301<|im_end|>"):
        assert ours.encode(text).tolist() == made.encode(text).ids
    assert [ours.token_id(t) for t in ("\u010a\u0120\u0120\u0120\u0120", "1", "2")] == ours.encode("\n    12").tolist()


def test_reading_a_tokenizer_folder_imports_no_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_klear.data.tokenizer import load_tokenizer; "
        f"load_tokenizer(Path({str(TINY)!r})).encode('a'); print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", ["tokenizer_qwen3", "tiny"])
def test_real_folders_are_read_as_transformers_reads_them(shared_data: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = TINY if name == "tiny" else shared_data / name
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.spec.special_tokens == theirs.special_tokens_map
    assert ours.spec.template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    for line in (ROOT / "examples" / "data" / "gsm8k_test_100.jsonl").read_text().splitlines():
        assert ours.encode(line).tolist() == theirs.encode(line, add_special_tokens=False)


TEXT_A, TEXT_B, TEXT_C = ("{# " + name + " #}" + PLAIN for name in "abc")
NAMED = [{"name": "tool_use", "template": TEXT_A}, {"name": "default", "template": TEXT_B}]
TEMPLATE_SOURCES: dict[str, tuple[object, dict[str, str], str]] = {
    "a text": (TEXT_A, {}, TEXT_A),
    "a list of named ones": (NAMED, {}, TEXT_B),
    "an object of named ones": ({"default": TEXT_A, "rag": TEXT_B}, {}, TEXT_A),
    "the file hides the setting": (TEXT_A, {"chat_template.jinja": TEXT_B}, TEXT_B),
    "a file of several": (None, {"chat_template.jinja": TEXT_A, "additional_chat_templates/rag.jinja": TEXT_B}, TEXT_A),
    "an additional default": (TEXT_A, {"additional_chat_templates/default.jinja": TEXT_B}, TEXT_B),
    "a default in both places": (
        TEXT_A, {"chat_template.jinja": TEXT_B, "additional_chat_templates/default.jinja": TEXT_C}, TEXT_C
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATE_SOURCES)
def test_templates_have_the_precedence_of_transformers(tmp_path: Path, case: str) -> None:
    from transformers import AutoTokenizer

    setting, files, expected = TEMPLATE_SOURCES[case]
    folder = folder_of(tmp_path, chat_template=setting, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert load_spec(folder).template == expected
    assert AutoTokenizer.from_pretrained(folder).get_chat_template() == expected


def test_a_template_of_a_processor_counts_where_there_is_no_other(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEXT_A}))
    assert load_spec(folder).template == TEXT_A
    (folder / "chat_template.jinja").write_text(TEXT_B)
    assert load_spec(folder).template == TEXT_B


@pytest.mark.parametrize("decoder", [False, True])
def test_special_tokens_come_from_the_files_that_transformers_follows(tmp_path: Path, decoder: bool) -> None:
    from transformers import AutoTokenizer

    added = {"507": {"content": "<|endoftext|>"}, "509": {"content": "<|im_end|>", "special": True}}
    settings: dict[str, object] = {
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False},
        "turn_token": "<|im_start|>",
        "extra_special_tokens": {"image_token": "<|im_end|>"},
        "add_bos_token": True,
        **({"added_tokens_decoder": added} if decoder else {}),
    }
    folder = folder_of(tmp_path, **settings, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    found = load_spec(folder).special_tokens
    assert found == AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert found == {
        "eos_token": "<|endoftext|>" if decoder else "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "turn_token": "<|im_start|>",
        "image_token": "<|im_end|>",
    }


CONTRADICTIONS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "added token absent": ({"added_tokens_decoder": {"512": {"content": "<x>"}}}, {}, "'<x>' with the id 512.*not add"),
    "other id": ({"added_tokens_decoder": {"508": {"content": "<|im_end|>"}}}, {}, "id 508, which .* gives the id 509"),
    "ordinary token": ({"added_tokens_decoder": {"70": "g"}}, {}, "does not add"),
    "legacy file": ({}, {"added_tokens.json": {"<x>": 512}}, r"added_tokens\.json adds the token '<x>'"),
    "other flag": (
        {"added_tokens_decoder": {"509": {"content": "<|im_end|>", "rstrip": True}}}, {}, "rstrip = True, .* False"
    ),
    "no id": ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, {}, "an id and a token are needed"),
    "no object": ({"added_tokens_decoder": [1]}, {}, "an object of ids and tokens is needed"),
    "eos absent": ({"eos_token": "</s>"}, {}, r"'</s>' \(eos_token\), which is not one token"),
    "eos in the map": ({}, {"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, "'</s>'"),
    "additional absent": ({"additional_special_tokens": ["<x>"]}, {}, r"'<x>' \(an additional special token\)"),
    "extra absent": ({"extra_special_tokens": [{"content": "<x>"}]}, {}, "'<x>'"),
    "written by the template": (
        {"bos_token": "<s>", "chat_template": "{{ bos_token }}" + PLAIN}, {}, r"'<s>' \(bos_token\)"
    ),
    "no token": ({"eos_token": 5}, {}, "eos_token of the tokenizer is 5"),
    "no default": ({"chat_template": {"rag": PLAIN}}, {}, "templates rag and none named default.*data.chat_template"),
    "list of texts": ({"chat_template": [PLAIN]}, {}, "objects of `name` and `template`"),
    "not an object": ({}, {"special_tokens_map.json": []}, r"special_tokens_map\.json is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_tokenizer_json_are_refused(tmp_path: Path, case: str) -> None:
    settings, files, words = CONTRADICTIONS[case]
    folder = folder_of(tmp_path, **settings)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_tokenizer(folder)


def test_flags_that_change_no_token_and_unused_names_may_differ(tmp_path: Path) -> None:
    """The tiny tokenizer has no normaliser, so that `normalized` decides nothing; no template writes pad."""
    added = {"509": {"content": "<|im_end|>", "normalized": True}}
    folder = folder_of(tmp_path, added_tokens_decoder=added, eos_token="<|im_end|>", pad_token="[PAD]")
    found = load_tokenizer(folder)
    assert (found.eos_token_id, found.pad_token_id) == (509, None)
    made = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    made.normalizer = normalizers.Lowercase()
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="normalized = True"):
        load_tokenizer(folder)


def run_the_remedy(message: str) -> None:
    command = message.split("`")[1]
    assert command.startswith("python -c ")
    subprocess.run(["bash", "-c", shlex.quote(sys.executable) + command.removeprefix("python")], check=True)


def test_the_remedy_for_an_absent_token_works(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "it's", eos_token="<|x y|>")
    with pytest.raises(DataError) as raised:
        load_tokenizer(folder)
    run_the_remedy(str(raised.value))
    assert load_tokenizer(folder).eos_token_id == 512


def test_the_remedy_for_a_folder_without_tokenizer_json_works(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "slow", tokenizer_class="GPT2Tokenizer", eos_token="<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json, only vocab\.json, merges\.txt; convert it") as raised:
        load_tokenizer(folder)
    run_the_remedy(str(raised.value))
    found = load_tokenizer(folder)
    assert found.decode(found.encode("hello 12<|im_end|>")) == "hello 12<|im_end|>"


def test_saved_folders_keep_every_file_of_the_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", eos_token="<|im_end|>", tokenizer_class="Qwen2Tokenizer")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "default.jinja").write_text(TEXT_B)
    (source / "config.json").write_text(json.dumps({"eos_token_id": 509}))
    copy_model_files(source, tmp_path / "saved")
    ours, theirs = (tokenizer_files(folder) for folder in (tmp_path / "saved", source))
    assert list(ours) == list(theirs)
    assert len(ours) == 3
    assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in ours)
    assert load_spec(tmp_path / "saved").template == TEXT_B
