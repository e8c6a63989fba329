#!/usr/bin/env bash
# Supervised adapters (LoRA) on the CPU: the fine-tuned model of the quickstart, which is run first where its model is missing,
# learns problems of another form while its weights stay as they are (docs/lora.md).
#
#     bash examples/sft_lora_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -d runs/quickstart_sft/hf ]; then
    bash examples/quickstart.sh
fi
. examples/setup_env.sh
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python pretrain_sft.py --config examples/sft_lora_tiny_cpu.toml "$@"
