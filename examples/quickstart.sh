#!/usr/bin/env bash
# From a bare clone to a trained model: make the environment, fine-tune a tiny model through Megatron-Core on packed
# sequences, show what it learnt. Needs Python 3.11 or 3.12 and a C++ compiler; no GPU.
#
#     bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
bash examples/sft_tiny_cpu.sh

python - <<'PYTHON'
import json
from pathlib import Path

run = Path("runs/sft_tiny_cpu")
losses = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
print("\nloss over 60 held-out problems, nats a token")
for entry in losses:
    print(f"  step {entry['step']:>4}   {entry['loss']:.3f}")
print(f"\nmetrics, settings and checkpoints are in {run}; remove it to train again.")
PYTHON
