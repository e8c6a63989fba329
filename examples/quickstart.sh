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
. examples/quickstart_data.sh

python tools/quickstart.py --seed "$SEED" --seconds-before "$SECONDS"
