"""Reinforcement learning with GPPO on verifiable problems, on Megatron-Core: `klear gppo` of a checkout.

python train_gppo.py --config examples/quickstart_gppo.toml                        # one process, no GPU
torchrun --nproc-per-node 8 train_gppo.py --config examples/gppo_32k.toml --optimizer.learning_rate 5e-7
"""

import sys

from megatron_klear.cli import main

if __name__ == "__main__":
    sys.exit(main(["gppo", *sys.argv[1:]]))
