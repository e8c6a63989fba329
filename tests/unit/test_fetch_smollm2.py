"""A GGUF file turned into a Hugging Face folder computes and tokenises as the model that it was made from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_klear.cli import fetch_smollm2
from megatron_klear.data.tiny import TinyShape, write_tiny_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k rows."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(folder: Path, path: Path, splitter: str = "smollm", left_out: str = "") -> None:
    """Write a tiny Llama folder as llama.cpp does, unquantised."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {token["content"]: 3 if token["special"] else 4 for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types([special.get(token, 1) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = {fetch_smollm2.hf_name(name): name for name in fetch_smollm2._OUTER_NAMES}
    for layer in range(config["num_hidden_layers"]):
        for name in fetch_smollm2._LAYER_NAMES:
            names[fetch_smollm2.hf_name(f"blk.{layer}.{name}")] = f"blk.{layer}.{name}"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        part = name.split(".")[-2]
        if name != left_out:
            writer.add_tensor(names[name], (permute(tensor, heads[part]) if part in heads else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_folder_from_gguf_is_the_model_it_came_from(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoTokenizer

    folder = write_tiny_model(tmp_path / "model", "llama", TinyShape(tied_embeddings=tied))
    write_gguf(folder, tmp_path / "model.gguf")
    counts = fetch_smollm2.write_folder(tmp_path / "model.gguf", tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert counts == {"F32": len(before)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = ("hidden_size", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads", "head_dim")
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out")]
    assert [configs[0][key] for key in kept] == [configs[1][key] for key in kept]
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", folder))
    messages = [{"role": "user", "content": "12 apples?"}, {"role": "assistant", "content": "<think>\nünï\n</think> 7"}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert ours.apply_chat_template(messages, tokenize=False) == text
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token == theirs.eos_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splitter": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not supported"),
        ({"left_out": "model.layers.2.mlp.up_proj.weight"}, r"lacks model\.layers\.2\.mlp\.up_proj\.weight"),
    ],
)
def test_unknown_or_incomplete_gguf_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    write_gguf(folder, tmp_path / "model.gguf", **change)
    with pytest.raises(fetch_smollm2.FetchError, match=message):
        fetch_smollm2.write_folder(tmp_path / "model.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_absent_source_is_named(tmp_path: Path) -> None:
    assert fetch_smollm2.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "no.whl")]) == 1
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(fetch_smollm2.FetchError, match=r"bad\.gguf is not a whole GGUF"):
        fetch_smollm2.write_folder(tmp_path / "bad.gguf", tmp_path / "out")
