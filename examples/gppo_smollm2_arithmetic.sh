#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (about 100 MB, once) and train it by GPPO on one- and two-digit sums and differences.
# Stopped half way, it goes on from the last checkpoint.
#
#     bash examples/gppo_smollm2_arithmetic.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

if [ ! -d models/SmolLM2-135M-Instruct ]; then
    python tools/fetch_smollm2.py --out models/SmolLM2-135M-Instruct
fi
python train_gppo.py --config examples/gppo_smollm2_arithmetic.toml "$@"
