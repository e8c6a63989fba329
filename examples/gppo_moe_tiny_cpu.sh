#!/usr/bin/env bash
# Reinforcement learning of a model with experts, on the CPU: SFT of a tiny Qwen3-MoE on sums whose answers are partly
# wrong, then GPPO with nothing but right or wrong.
#
#     bash examples/gppo_moe_tiny_cpu.sh [--dotted.key value ...]
#
# Stopped half way, it goes on from the last checkpoint; remove runs/moe_tiny_data and runs/*_moe_tiny_cpu to start again.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
if [ ! -d runs/sft_moe_tiny_cpu/hf ]; then
    bash examples/sft_moe_tiny_cpu.sh
fi
python train_gppo.py --config examples/gppo_moe_tiny_cpu.toml "$@"
