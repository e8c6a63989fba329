"""A tiny model that knows a few answers by heart, so that what rollout engines hand on can be told to the letter."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_klear.data.rows import ChatRow
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.data.tokenizer import load_tokenizer

SHAPE = TinyShape(hidden_size=64, ffn_hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
MAX_STEPS = 400


def write_memorised_model(folder: Path, answers: Mapping[str, str]) -> Path:
    """Write a model that, sampled greedily, says the answer to each question and ends its turn."""
    from transformers import AutoModelForCausalLM

    write_tiny_model(folder, "qwen3", SHAPE)
    tokenizer = load_tokenizer(folder)
    samples = [tokenizer.encode_row(chat_row(question, answer)) for question, answer in answers.items()]
    tokens = pad_sequence([torch.from_numpy(sample.tokens).long() for sample in samples], batch_first=True)
    trained = pad_sequence([torch.from_numpy(sample.trained) for sample in samples], batch_first=True)
    labels = torch.where(trained, tokens, -100)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(MAX_STEPS):
        loss = model(input_ids=tokens, labels=labels).loss  # padding stands behind all that is trained
        if float(loss.detach()) < 5e-3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        raise RuntimeError(f"the model has not learnt its answers: loss {float(loss.detach()):.3f}")
    model.save_pretrained(folder)
    return folder


def chat_row(question: str, answer: str) -> ChatRow:
    """The row that teaches one answer."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return ChatRow(messages=messages, tools=())


def write_problems(path: Path, answers: Mapping[str, str], ground_truth: str) -> None:
    """Rows that ask the questions."""
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "data_source": "math",
            "reward_model": {"ground_truth": ground_truth},
        }
        for question in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
