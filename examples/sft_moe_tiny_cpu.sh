#!/usr/bin/env bash
# Train a tiny Qwen3-MoE with random weights on worked sums whose answers are partly wrong, on the CPU.
#
#     bash examples/sft_moe_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
DATA=runs/moe_tiny_data

if [ ! -d $DATA ]; then
    mkdir -p $DATA.partial
    arithmetic() { python tools/prepare_data.py arithmetic --terms 2 --digits 1 --operators=+- --force "$@"; }
    arithmetic --count 100 --seed 1000 --output $DATA.partial/held_out.jsonl
    arithmetic --count 4000 --seed 1 --slip-share 0.4 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/sft.jsonl
    arithmetic --count 4000 --seed 2 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/problems.jsonl
    python tools/make_tiny_model.py --family qwen3_moe --output $DATA.partial/model --no-weights --force \
        --layers 2 --hidden 128 --heads 4 --kv-heads 2 --head-dim 32 --experts 8 --experts-per-token 2 --expert-ffn 96
    mv $DATA.partial $DATA
fi
python pretrain_sft.py --config examples/sft_moe_tiny_cpu.toml "$@"
