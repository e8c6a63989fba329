#!/usr/bin/env bash
# Qwen3-8B-Base on long chains of thought, one node of 8 GPUs. Data: chat rows in data/sft/*.parquet; model: a Hugging
# Face folder in models/Qwen3-8B-Base. For several nodes see sft_32k.slurm.
#
#     bash examples/sft_32k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

# What the run would take and lack, before eight GPUs are started.
WORLD_SIZE="${GPUS:-8}" python pretrain_sft.py --config examples/sft_32k.toml --dry-run "$@"
torchrun --nproc-per-node "${GPUS:-8}" pretrain_sft.py --config examples/sft_32k.toml "$@"
