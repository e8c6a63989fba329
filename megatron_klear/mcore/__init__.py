"""Megatron-Core behind the Engine; the only room that imports megatron."""

import megatron_klear.config.start  # noqa: F401  (before Megatron: pydantic seeks its classes' docstrings in all modules)
