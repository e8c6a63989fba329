#!/usr/bin/env bash
# Adapters (LoRA) by GPPO on the CPU: the quickstart's data and fine-tuned model, made here where they are missing, then 40
# steps that train adapters and leave the model's weights as they are (docs/lora.md).
#
#     bash examples/gppo_lora_tiny_cpu.sh          bash examples/gppo_lora_tiny_cpu.sh --lora.rank 1 --output runs/rank1
#
# Leaves the merged model in runs/gppo_lora_tiny_cpu/hf and the adapter in runs/gppo_lora_tiny_cpu/adapter.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
. examples/quickstart_data.sh
if [ ! -d runs/quickstart_sft/hf ]; then
    python pretrain_sft.py --config examples/quickstart_sft.toml
fi
python train_gppo.py --config examples/gppo_lora_tiny_cpu.toml "$@"
