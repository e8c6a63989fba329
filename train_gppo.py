"""Reinforcement learning with GPPO on verifiable problems, on Megatron-Core.

python train_gppo.py --config examples/quickstart_gppo.toml                        # one process, no GPU
torchrun --nproc-per-node 8 train_gppo.py --config examples/gppo_32k.toml --optimizer.learning_rate 5e-7
"""

from megatron_klear.errors import exit_on_error
from megatron_klear.start import start_gppo


def main() -> None:
    """Refuse what cannot work, then train; the heavy imports wait until the settings are known to be good."""
    start = start_gppo(description=__doc__)
    from megatron_klear.train import rl_run

    with exit_on_error():
        rl_run.run(start)


if __name__ == "__main__":
    main()
