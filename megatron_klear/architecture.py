"""Kept for one release: `megatron_klear.models.architecture` is the module now."""

from megatron_klear.models.architecture import (
    Architecture,
    ArchitectureError,
    architecture_from_config,
    read_architecture,
)

__all__ = ["Architecture", "ArchitectureError", "architecture_from_config", "read_architecture"]
