"""Supervised fine-tuning on long chains of thought, packed, on Megatron-Core.

klear sft --config examples/sft_tiny_cpu.toml                                       # one process, no GPU
torchrun --nproc-per-node 8 -m megatron_klear.cli sft --config examples/sft_32k.toml --optimizer.learning_rate 5e-5
klear sft --config examples/sft_32k.toml --dry-run=8

In a checkout, pretrain_sft.py is the same: torchrun --nproc-per-node 8 pretrain_sft.py --config examples/sft_32k.toml
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_klear.cli.environment import heavy_imports
from megatron_klear.config.start import start_sft
from megatron_klear.errors import exit_on_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Refuse what cannot work, then train; the heavy imports wait until the settings are known to be good."""
    start = start_sft(arguments, description=__doc__)
    with heavy_imports():
        from megatron_klear.train import sft

    with exit_on_error():
        sft.run(start)
