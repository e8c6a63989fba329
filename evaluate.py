"""Evaluation on benchmarks, with intervals, beside what was published: `klear evaluate` of a checkout.

python evaluate.py --config examples/evaluate_gsm8k.toml --model.path runs/quickstart/hf
"""

import sys

from megatron_klear.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
