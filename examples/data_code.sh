#!/usr/bin/env bash
# Code in small, from sources to trained: as examples/data_math.sh, with programs that are run on their tests in the sandbox.
# Needs bubblewrap. examples/data_code.toml says what is done to which files; flags go to the build.
#
#     bash examples/data_code.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
DATA=runs/data_code
TASKS=runs/data_code_tasks
if [ ! -d $TASKS ]; then
    python tools/prepare_data.py code --count 20 --seed 1000 --force --output $TASKS.partial/held_out.jsonl
    python tools/prepare_data.py code --count 400 --force --exclude $TASKS.partial/held_out.jsonl --output $TASKS.partial/rows.jsonl
    mv $TASKS.partial $TASKS
fi
klear curate build --config examples/data_code.toml "$@"
python pretrain_sft.py --config examples/sft_tiny_cpu.toml --output runs/data_code_sft --checkpoint.export_hf true \
    --data.train $DATA/sft/rows.jsonl --train.steps 20
python train_gppo.py --config examples/gppo_code_tiny_cpu.toml --output runs/data_code_gppo \
    --model.path runs/data_code_sft/hf --prompts.sources "[{ files = ['$DATA/code_rl/rows.jsonl'] }]" \
    --prompts.max_tokens 512 --algorithm.overlong_penalty.buffer_tokens 128 \
    --validation.sources "[{ files = ['$TASKS/held_out.jsonl'] }]" --train.steps 2
echo "$DATA/report.html"
