"""Model families, without Megatron: shapes, names of weights, rotary embeddings, stop tokens, safetensors files."""
