#!/usr/bin/env bash
# The code stage in small, on the CPU: a tiny model learns to write functions by cases from programs that are partly wrong,
# then by GPPO from the share of tests that its own programs pass in the sandbox (docs/code_rewards.md). Needs bubblewrap.
#
#     bash examples/gppo_code_tiny_cpu.sh                          CASES=2 bash examples/gppo_code_tiny_cpu.sh
#     bash examples/gppo_code_tiny_cpu.sh --reward.code.kind hard --output runs/hard
#
# Soft against hard reward over seeds: klear ablate examples/ablations/soft_reward.toml. Stopped half way, it goes on from
# the last checkpoint; remove runs/code_tiny_data and runs/sft_code_tiny_cpu to start again.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
DATA=runs/code_tiny_data

if [ ! -d $DATA ]; then
    mkdir -p $DATA.partial
    code() { python tools/prepare_data.py code --cases "${CASES:-3}" --force "$@"; }
    code --count 100 --seed 1000 --output $DATA.partial/held_out.jsonl
    code --count 6000 --seed 1 --slip-share 0.4 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/sft.jsonl
    code --count 4000 --seed 2 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/problems.jsonl
    python tools/make_tiny_model.py --output $DATA.partial/model --no-weights --force \
        --layers 2 --hidden 128 --ffn 256 --heads 4 --kv-heads 2 --head-dim 32
    mv $DATA.partial $DATA
fi
if [ ! -d runs/sft_code_tiny_cpu/hf ]; then
    python pretrain_sft.py --config examples/sft_code_tiny_cpu.toml
fi
python train_gppo.py --config examples/gppo_code_tiny_cpu.toml "$@"
