#!/usr/bin/env bash
# Qwen3-30B-A3B-Base on long chains of thought, two nodes of 8 GPUs or more; to be started on each of them. Data: chat rows
# in data/sft/*.parquet; model: a Hugging Face folder in models/Qwen3-30B-A3B-Base; both on a shared file system.
#
#     HEAD_NODE=node1 NODES=2 bash examples/sft_30b_a3b_32k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

NODES="${NODES:-2}"
# What the run would take and lack, before any GPU is started.
WORLD_SIZE=$((8 * NODES)) python pretrain_sft.py --config examples/sft_30b_a3b_32k.toml --dry-run "$@"
torchrun --nnodes "$NODES" --nproc-per-node 8 \
    --rdzv-id sft_30b_a3b_32k --rdzv-backend c10d --rdzv-endpoint "${HEAD_NODE:?name the first node}:29500" \
    pretrain_sft.py --config examples/sft_30b_a3b_32k.toml "$@"
