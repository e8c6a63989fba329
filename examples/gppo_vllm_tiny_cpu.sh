#!/usr/bin/env bash
# GPPO on sums with rollouts from a real vLLM server, on two CPU cores and without a GPU. The server lives in an
# environment of its own, made here where it is missing (2 GB).
#
#     bash examples/gppo_vllm_tiny_cpu.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -d runs/quickstart_sft/hf ]; then
    bash examples/quickstart.sh
fi
. examples/setup_env.sh
bash tools/make_vllm_env.sh --cpu vllm-env
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python train_gppo.py --config examples/gppo_vllm_tiny_cpu.toml "$@"
