#!/usr/bin/env bash
# Make a tiny Qwen3 with random weights, train it on 600 arithmetic problems on the CPU, show the held-out loss.
#
#     bash examples/sft_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -d runs/tiny/model ]; then
    python tools/make_tiny_model.py --output runs/tiny/model --no-weights
fi
python pretrain_sft.py --config examples/sft_tiny_cpu.toml "$@"
