"""Convert model weights, in the direction that the source says; each has its own --help.

klear convert --hf models/Qwen3-8B-Base --out models/Qwen3-8B-mcore --tensor 2 --pipeline 2
klear convert --mcore runs/sft/checkpoints/step-00001000 --out models/tuned
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_klear.cli import convert_hf_to_mcore, convert_mcore_to_hf


def main(arguments: Sequence[str]) -> int:
    """Convert; exit code 1 with a message where that fails, 2 where no direction is given."""
    words = list(arguments)
    names = [word.partition("=")[0] for word in words]
    directions = {"--hf": convert_hf_to_mcore.main, "--mcore": convert_mcore_to_hf.main}
    given = [main for flag, main in directions.items() if flag in names]
    if len(given) == 1:
        return given[0](words)
    if "--help" in names or "-h" in names:
        for module in (convert_hf_to_mcore, convert_mcore_to_hf):
            print(module.parser().format_help())
        return 0
    print("convert: give --hf FOLDER, or --mcore CHECKPOINT, and --out", file=sys.stderr)
    return 2
