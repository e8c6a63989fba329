"""Supervised fine-tuning on long chains of thought, packed, on Megatron-Core: `klear sft` of a checkout.

python pretrain_sft.py --config examples/sft_tiny_cpu.toml                          # one process, no GPU
torchrun --nproc-per-node 8 pretrain_sft.py --config examples/sft_32k.toml --optimizer.learning_rate 5e-5
python pretrain_sft.py --config examples/sft_32k.toml --dry-run=8
"""

import sys

from megatron_klear.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
