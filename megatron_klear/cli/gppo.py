"""Reinforcement learning with GPPO on verifiable problems, on Megatron-Core.

klear gppo --config examples/quickstart_gppo.toml                                   # one process, no GPU
torchrun --nproc-per-node 8 -m megatron_klear.cli gppo --config examples/gppo_32k.toml --optimizer.learning_rate 5e-7

In a checkout, train_gppo.py is the same: torchrun --nproc-per-node 8 train_gppo.py --config examples/gppo_32k.toml
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_klear.cli.environment import heavy_imports
from megatron_klear.config.start import start_gppo
from megatron_klear.errors import exit_on_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Refuse what cannot work, then train; the heavy imports wait until the settings are known to be good."""
    start = start_gppo(arguments, description=__doc__)
    with heavy_imports():
        from megatron_klear.train import rl_run

    with exit_on_error():
        rl_run.run(start)
