"""Tiny Hugging Face models and their tokenizer, written from nothing: what the CPU quickstart and the tests train.

`write_tiny_model` makes a folder with everything a real model folder has: config.json, tokenizer files, a chat template
with generation marks and, if asked, random safetensors weights. Only the weights need torch and transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klear.data.arithmetic import arithmetic_rows
from megatron_klear.models.families import FAMILIES

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK_START, THINK_END = "<think>", "</think>"
VOCAB_SIZE = 512
_END_IDS = {"eos_token_id": VOCAB_SIZE - 3, "pad_token_id": VOCAB_SIZE - 5}

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if message.reasoning_content is defined and message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_PROSE = """\
Let me think step by step. First, we need to find the number of apples that she has in the basket.
There are twelve students in the class, and each of them reads three books every week for four weeks.
So the total cost is the price of one ticket times the number of tickets. How many are left at the end?
He sells half of what he has, then buys two more. Therefore the answer is the sum of all the parts.
We check the result: wait, that is not right, because the difference must be positive. Now it holds.
Put the final answer in \\boxed{}. The answer is \\boxed{42}. Solve the equation for x and simplify the fraction.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyShape:
    """Sizes of a tiny decoder. The defaults divide by tensor parallelism 2 and pipeline times virtual parallelism 4."""

    hidden_size: int = 64
    ffn_hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = VOCAB_SIZE
    max_positions: int = 4096
    tied_embeddings: bool = False
    num_experts: int = 8
    """Of families with experts."""
    experts_per_token: int = 2
    expert_ffn_hidden_size: int = 32
    rope_theta: float = 10000.0
    initializer_range: float = 0.02


def write_tiny_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 512 entries with ChatML turns and `<think>` marks into `folder`.

    Digits are never merged. The four files are tokenizer.json, tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    added = [
        AddedToken(text, special=text not in (THINK_START, THINK_END), normalized=False)
        for text in (END_OF_TEXT, TURN_START, TURN_END, THINK_START, THINK_END)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tiny tokenizer has {tokenizer.get_vocab_size()} entries, expected {VOCAB_SIZE}")
    folder.mkdir(parents=True, exist_ok=True)
    named = {"eos_token": TURN_END, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def tiny_config(family: str, shape: TinyShape | None = None) -> dict[str, Any]:
    """The config.json of a tiny model of `family`; ids of the end tokens are those of the tiny tokenizer."""
    shape = shape or TinyShape()
    of_family = FAMILIES[family]
    if shape.num_heads * shape.head_dim != shape.hidden_size and not of_family.own_head_dim:
        raise ValueError(
            f"{family} has no head_dim of its own: {shape.num_heads} heads must divide {shape.hidden_size}"
        )
    if shape.vocab_size < VOCAB_SIZE:
        raise ValueError(f"vocab_size {shape.vocab_size} is below the tiny tokenizer's {VOCAB_SIZE}")
    config: dict[str, Any] = {
        "architectures": [of_family.causal_lm],
        "model_type": family,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        "initializer_range": shape.initializer_range,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        **_END_IDS,
        "torch_dtype": "float32",
    }
    if of_family.own_head_dim:
        config |= {"head_dim": shape.head_dim, "attention_bias": False}
    if of_family.experts:
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_ffn_hidden_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def write_tiny_model(
    folder: Path,
    family: str = "qwen3",
    shape: TinyShape | None = None,
    *,
    weights: bool = True,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write a tiny model folder and return it; complete or not at all.

    `weights=False` leaves out model.safetensors (for runs with `model.weights = "random"`) and needs no torch.
    Raises FileExistsError where `folder` exists and `force` is false.
    """
    folder = Path(folder)
    if folder.exists() and not force:
        raise FileExistsError(f"{folder} exists; remove it, choose another folder or pass --force")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    partial.chmod(0o755)
    try:
        write_tiny_tokenizer(partial)
        _write_json(partial / "config.json", tiny_config(family, shape))
        _write_json(
            partial / "generation_config.json", {"eos_token_id": VOCAB_SIZE - 3, "pad_token_id": VOCAB_SIZE - 5}
        )
        if weights:
            _write_random_weights(partial, seed)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write_random_weights(folder: Path, seed: int) -> None:
    """Write model.safetensors as transformers initialises it, without touching its files beside it or the RNG."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        # A fresh model's norms are all one and its biases zero, which would hide a swapped or forgotten one.
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.data += 0.05 * torch.randn_like(parameter)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        model.save_pretrained(saved)  # under the names that are published, whatever its modules are called
        os.rename(Path(saved) / "model.safetensors", folder / "model.safetensors")


def _corpus() -> Iterator[str]:
    for row in arithmetic_rows(300, seed=0, terms=4, digits=3):
        yield row["prompt"][0]["content"]
        yield row["response"]
    yield from [*_PROSE.splitlines(), "system", "user", "assistant"] * 20


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
