"""Tiny models and their tokenizer are real Hugging Face folders."""

import json
from pathlib import Path

import pytest

from megatron_klear.data.tiny import VOCAB_SIZE, TinyShape, tiny_config, write_tiny_model, write_tiny_tokenizer
from megatron_klear.models.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("qwen3", "qwen2", "llama")


def test_committed_tokenizer_is_what_the_tool_writes(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    committed = ROOT / "examples" / "tiny_tokenizer"
    assert {path.name for path in committed.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_text() == (committed / path.name).read_text(), path.name


def test_committed_model_is_what_the_tool_writes(tmp_path: Path) -> None:
    written, committed = write_tiny_model(tmp_path / "model", weights=False), ROOT / "examples" / "tiny_model"
    assert {path.name: path.read_text() for path in written.iterdir()} == {
        path.name: path.read_text() for path in committed.iterdir()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_load_and_match_the_architecture(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", family, TinyShape(num_layers=2, tied_embeddings=tied))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == read_architecture(folder).num_parameters


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    shape = TinyShape(num_layers=1)
    files = [write_tiny_model(tmp_path / str(i), seed=seed, shape=shape) for i, seed in enumerate((1, 1, 2))]
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in files)
    assert first == same
    assert first != other


def test_special_ids_in_the_config_are_the_tokenizers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path / "model", weights=False)
    assert not (folder / "model.safetensors").exists()
    config, tokenizer = json.loads((folder / "config.json").read_text()), AutoTokenizer.from_pretrained(folder)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert len(tokenizer) == VOCAB_SIZE


def test_existing_folder_is_left_alone_without_force(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        write_tiny_model(tmp_path, weights=False)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [("qwen2", TinyShape(head_dim=32), "head_dim"), ("llama", TinyShape(vocab_size=100), "vocab_size 100")],
)
def test_impossible_shapes_are_refused(family: str, shape: TinyShape, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(family, shape)
