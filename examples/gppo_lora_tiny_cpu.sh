#!/usr/bin/env bash
# Adapters (LoRA) by GPPO on the CPU: 40 steps from the fine-tuned model of the quickstart, which is run first where its model is
# missing. The model's weights stay as they are (docs/lora.md).
#
#     bash examples/gppo_lora_tiny_cpu.sh          bash examples/gppo_lora_tiny_cpu.sh --lora.rank 1 --output runs/rank1
#
# Leaves the merged model in runs/gppo_lora_tiny_cpu/hf and the adapter in runs/gppo_lora_tiny_cpu/adapter.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -d runs/quickstart_sft/hf ]; then
    bash examples/quickstart.sh
fi
. examples/setup_env.sh
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python train_gppo.py --config examples/gppo_lora_tiny_cpu.toml "$@"
