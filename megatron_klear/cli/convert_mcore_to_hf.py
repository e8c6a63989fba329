"""Convert a Megatron checkpoint, of a training run or of convert_hf_to_mcore.py, into a Hugging Face model folder.

klear convert --mcore runs/sft/checkpoints/step-00001000 --out models/tuned

Of a run with adapters the output is their folder as PEFT reads it, or with --base, which names the model they were
trained on, the merged model.

Runs in one process on the CPU. Before the output gets its name it is read back and compared: every tensor bit for bit,
and transformers' logits on it with ours.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_klear.cli.environment import heavy_imports

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def num_bytes(text: str) -> int:
    """A size such as 500MB or 5GB, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore", type=Path, required=True, help="checkpoint folder, such as .../step-00001000")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--base", type=Path, help="of adapters: merge them into this model, the one under them")
    parser.add_argument("--max-shard-size", type=num_bytes, default="5GB", help="largest safetensors file (5GB)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out, once the new one is proven")
    parser.add_argument("--no-forward-check", action="store_true", help="skip the comparison of logits (large models)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Convert; exit code 1 with a message where that fails."""
    options = parser().parse_args(arguments)
    with heavy_imports():
        from megatron_klear.errors import UserError
        from megatron_klear.mcore.checkpoints.adapters import Base, megatron_to_peft
        from megatron_klear.mcore.checkpoints.convert import megatron_to_hf

    try:
        adapted = Base.read(options.mcore) is not None
        if options.base is not None and not adapted:
            raise UserError(f"{options.mcore} holds a whole model: leave --base out")
        if adapted and options.base is None:
            count = megatron_to_peft(options.mcore, options.out, force=options.force)
            print(f"wrote {options.out}: {count} tensors of adapters, bitwise equal; --base merges them into a model")
            return 0
        verdict = megatron_to_hf(
            options.mcore,
            options.out,
            base=options.base,
            max_shard_bytes=options.max_shard_size,
            force=options.force,
            forward_check=not options.no_forward_check,
        )
    except (UserError, OSError) as error:
        print(f"convert_mcore_to_hf: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}: {verdict}")
    return 0
