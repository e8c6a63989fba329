#!/usr/bin/env bash
# The 32K supervised recipe on one node of 8 GPUs. Expects models/Qwen3-8B-Base and data/sft/*.parquet.
set -euo pipefail
cd "$(dirname "$0")/.."
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" pretrain_sft.py --config examples/sft_32k.toml "$@"
