"""The 260K Llama that wrote its first stories for llama2.c, as a Hugging Face folder."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_stories_model(source: Path, folder: Path) -> Path:
    """Turn llama2.c's legacy checkpoint (seven int32, then fp32 tensors) into config.json and model.safetensors.

    llama2.c rotates neighbouring pairs of a head's rows, Hugging Face the two halves of it: rows of q and k move.
    """
    data = source.read_bytes()
    hidden, ffn, layers, heads, kv_heads, vocab, positions = struct.unpack("7i", data[:28])
    head_dim = hidden // heads
    floats = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    offset = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        size = torch.Size(shape).numel()
        tensor = floats[offset : offset + size].reshape(shape)
        offset += size
        return tensor

    def halves(rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows.reshape(count, head_dim // 2, 2, hidden).transpose(1, 2).reshape(rows.shape)

    tensors = {"model.embed_tokens.weight": take(abs(vocab), hidden)}
    stacked = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": take(layers, heads * head_dim, hidden),
        "self_attn.k_proj": take(layers, kv_heads * head_dim, hidden),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, hidden),
        "self_attn.o_proj": take(layers, hidden, heads * head_dim),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, ffn, hidden),
        "mlp.down_proj": take(layers, hidden, ffn),
        "mlp.up_proj": take(layers, ffn, hidden),
    }
    tensors["model.norm.weight"] = take(hidden)
    counts = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
    for name, whole in stacked.items():
        for layer, tensor in enumerate(whole):
            tensors[f"model.layers.{layer}.{name}.weight"] = halves(tensor, counts[name]) if name in counts else tensor
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocab),
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": vocab > 0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
