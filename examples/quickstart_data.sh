# Read by scripts: leaves the quickstart's data in runs/quickstart_data, where it is missing.
DATA=runs/quickstart_data

if [ ! -d $DATA ]; then
    mkdir -p $DATA.partial
    arithmetic() { python tools/prepare_data.py arithmetic --terms 2 --digits 1 --operators=+- --force "$@"; }
    arithmetic --count 100 --seed 1000 --output $DATA.partial/held_out.jsonl
    # The teacher slips in two of five steps: fine-tuning imitates that, and the check of answers unteaches it.
    arithmetic --count 4000 --seed 1 --slip-share 0.4 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/sft.jsonl
    arithmetic --count 4000 --seed 2 --exclude $DATA.partial/held_out.jsonl --output $DATA.partial/problems.jsonl
    python tools/make_tiny_model.py --output $DATA.partial/model --no-weights --force \
        --layers 2 --hidden 128 --ffn 256 --heads 4 --kv-heads 2 --head-dim 32
    mv $DATA.partial $DATA
fi
