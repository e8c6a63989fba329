"""Extend a model's context by YaRN: a folder with another config.json, and links to weights and tokenizer.

klear extend --model runs/gppo/hf --output runs/gppo/hf_80k                  # factor 2.5, as the paper evaluates at 64K
klear extend --model Qwen3-8B --output Qwen3-8B-128k --factor 4

The trainer, the local engine, transformers and vLLM read the folder alike. YaRN is static: it changes short prompts
too, so what is evaluated at 32K is the original folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_klear.errors import exit_on_error
from megatron_klear.models.architecture import read_architecture
from megatron_klear.models.extend import PAPER_FACTOR, write_extended


def main(arguments: list[str] | None = None) -> None:
    """Write the folder; exit code 1 with a message where the model cannot be extended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--factor", type=float, default=PAPER_FACTOR, help=f"default {PAPER_FACTOR:g}")
    parser.add_argument(
        "--original", type=int, help="positions of training (default: the largest power of two that the model has)"
    )
    options = parser.parse_args(arguments)
    with exit_on_error():
        folder = write_extended(options.model, options.output, options.factor, options.original)
        print(f"{read_architecture(folder).max_positions} positions -> {folder}")
