"""Convert a Hugging Face model folder into a Megatron checkpoint of weights, which loads in any layout.

klear convert --hf models/Qwen3-8B-Base --out models/Qwen3-8B-mcore --tensor 2 --pipeline 2

Starts its own processes, on the CPU. Before the output gets its name it is loaded back and compared: every tensor bit
for bit, and the logits with transformers'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_klear.cli.environment import heavy_imports


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder: config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes that write")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel processes that write")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as stored (fp32 unless all is bf16)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out, once the new one is proven")
    parser.add_argument("--no-forward-check", action="store_true", help="skip the comparison of logits (large models)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Convert; exit code 1 with a message where that fails."""
    options = parser().parse_args(arguments)
    with heavy_imports():
        from megatron_klear.errors import UserError
        from megatron_klear.mcore.checkpoints.convert import hf_to_megatron

    try:
        verdict = hf_to_megatron(
            options.hf,
            options.out,
            tensor=options.tensor,
            pipeline=options.pipeline,
            dtype=options.dtype,
            force=options.force,
            forward_check=not options.no_forward_check,
        )
    except (UserError, OSError) as error:
        print(f"convert_hf_to_mcore: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}: {verdict}")
    return 0
