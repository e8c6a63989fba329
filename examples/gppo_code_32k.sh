#!/usr/bin/env bash
# GPPO on code with responses of up to 32K tokens, one node of 8 GPUs, rollouts from vLLM on the same cards, programs in
# sandboxes on its cores. Not yet run. Data: code problems in data/rl/ (docs/code_rewards.md); model: the Hugging Face
# folder that gppo_32k left, in models/Qwen3-8B-GPPO. Needs bubblewrap (`python tools/doctor.py` says). On 64 GPUs:
# CONFIG=examples/gppo_code_32k.toml sbatch examples/rollout_servers.slurm.
#
#     bash examples/gppo_code_32k.sh [--dotted.key value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

# What the run would take and lack, before vLLM is installed (nothing where it is there already) and eight GPUs started.
WORLD_SIZE="${GPUS:-8}" python train_gppo.py --config examples/gppo_code_32k.toml --rollout.server.python "$(command -v python)" \
    --dry-run "$@"
bash tools/make_vllm_env.sh vllm-env
torchrun --nproc-per-node "${GPUS:-8}" train_gppo.py --config examples/gppo_code_32k.toml "$@"
