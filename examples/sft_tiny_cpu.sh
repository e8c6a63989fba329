#!/usr/bin/env bash
# Train a tiny Qwen3 with random weights on 600 arithmetic problems on the CPU, show the held-out loss.
#
#     bash examples/sft_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

python pretrain_sft.py --config examples/sft_tiny_cpu.toml "$@"
