"""Megatron-Core behind the Engine; the only room that imports megatron."""
