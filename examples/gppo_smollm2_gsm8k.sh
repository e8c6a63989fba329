#!/usr/bin/env bash
# Fine-tune SmolLM2-135M-Instruct on GSM8K where that has not been done, then train it by GPPO. Not yet measured.
#
#     bash examples/gppo_smollm2_gsm8k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

if [ ! -d runs/sft_smollm2_gsm8k/hf ]; then
    bash examples/sft_smollm2_gsm8k.sh
fi
python train_gppo.py --config examples/gppo_smollm2_gsm8k.toml "$@"
