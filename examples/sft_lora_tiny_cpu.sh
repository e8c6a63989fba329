#!/usr/bin/env bash
# Supervised adapters (LoRA) on the CPU: the quickstart's fine-tuned model, made here where it is missing, learns problems of
# another form while its weights stay as they are (docs/lora.md).
#
#     bash examples/sft_lora_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
. examples/quickstart_data.sh
if [ ! -d runs/quickstart_sft/hf ]; then
    python pretrain_sft.py --config examples/quickstart_sft.toml
fi
python pretrain_sft.py --config examples/sft_lora_tiny_cpu.toml "$@"
