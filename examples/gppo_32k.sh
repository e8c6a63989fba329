#!/usr/bin/env bash
# GPPO on mathematics with responses of up to 32K tokens, one node of 8 GPUs, rollouts from vLLM on the same cards. Not yet
# run. Data: problems in data/rl/ (docs/data.md); model: the Hugging Face folder of a fine-tuned Qwen3-8B in
# models/Qwen3-8B-SFT. On 64 GPUs: rollout_servers.slurm.
#
#     bash examples/gppo_32k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

# What the run would take and lack, before vLLM is installed (nothing where it is there already) and eight GPUs started.
WORLD_SIZE="${GPUS:-8}" python train_gppo.py --config examples/gppo_32k.toml --rollout.server.python "$(command -v python)" \
    --dry-run "$@"
bash tools/make_vllm_env.sh vllm-env
torchrun --nproc-per-node "${GPUS:-8}" train_gppo.py --config examples/gppo_32k.toml "$@"
