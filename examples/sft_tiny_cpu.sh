#!/usr/bin/env bash
# A tiny model on arithmetic with worked-out thinking, in one process without a GPU: about a minute on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
[ -d runs/tiny_model ] || "$python" tools/make_tiny_model.py --output runs/tiny_model --family qwen3 --no-weights
exec "$python" pretrain_sft.py --config examples/sft_tiny_cpu.toml "$@"
