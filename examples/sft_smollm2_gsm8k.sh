#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (about 100 MB, once) and fine-tune it on GSM8K.
#
#     bash examples/sft_smollm2_gsm8k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

if [ ! -d models/SmolLM2-135M-Instruct ]; then
    python tools/fetch_smollm2.py --out models/SmolLM2-135M-Instruct
fi
python pretrain_sft.py --config examples/sft_smollm2_gsm8k.toml "$@"
