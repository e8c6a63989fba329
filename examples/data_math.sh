#!/usr/bin/env bash
# Mathematics in small, from sources to trained: duplicates and overlap with the benchmark dropped, a subset chosen, then a few
# steps of SFT and of GPPO of a tiny model on the CPU, to show that the sets are trained on. examples/data_math.toml says what
# is done to which files; flags go to the build.
#
#     bash examples/data_math.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the model is too small to be shared out
DATA=runs/data_math
klear curate build --config examples/data_math.toml "$@"
python pretrain_sft.py --config examples/sft_tiny_cpu.toml --output runs/data_math_sft --checkpoint.export_hf true \
    --data.train $DATA/sft/rows.jsonl --train.steps 20
python train_gppo.py --config examples/quickstart_gppo.toml --output runs/data_math_gppo --model.path runs/data_math_sft/hf \
    --prompts.sources "[{ files = ['$DATA/math_rl/rows.jsonl'] }]" --prompts.max_tokens 512 \
    --validation.sources "[{ files = ['examples/data/gsm8k_test_100.jsonl'] }]" --validation.sampling.samples_per_prompt 1 \
    --algorithm.max_generation_rounds 1 --algorithm.overlong_penalty.buffer_tokens 64 --train.steps 2
echo "$DATA/report.html"
