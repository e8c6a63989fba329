"""vLLM servers that the run starts: their commands, their processes and who watches them."""
