#!/usr/bin/env bash
# From a bare clone to a model that learnt by reinforcement: make the environment, fine-tune a tiny model on worked sums,
# train it by GPPO on sums whose answers are checked, evaluate both on held-out sums, write reports. Needs Python 3.11
# or 3.12 and a C++ compiler; no GPU.
#
#     bash examples/quickstart.sh          SEED=1 bash examples/quickstart.sh
#
# Leaves runs/quickstart/summary.json, report.html beside it and runs/quickstart_evaluation/gppo/report.html; remove
# runs/quickstart* to start again. Stopped half way, it goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
SECONDS=0 # bash counts on from here
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
SEED=${SEED:-0}
DATA=runs/quickstart_data

if [ ! -d $DATA ]; then
    mkdir -p $DATA.partial
    arithmetic() { python tools/prepare_data.py arithmetic --terms 2 --digits 1 --operators=+- --force "$@"; }
    arithmetic --count 100 --seed 1000 --output $DATA.partial/held_out.jsonl
    # The teacher slips in two of five steps: fine-tuning imitates that, and the check of answers unteaches it.
    arithmetic --count 4000 --seed 1 --slip-share 0.4 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/sft.jsonl
    arithmetic --count 4000 --seed 2 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/problems.jsonl
    python tools/make_tiny_model.py --output $DATA.partial/model --no-weights --force \
        --layers 2 --hidden 128 --ffn 256 --heads 4 --kv-heads 2 --head-dim 32
    mv $DATA.partial $DATA
fi

python tools/quickstart.py --seed "$SEED" --seconds-before "$SECONDS" "$@"
