"""Write a tiny Hugging Face model folder, or only its tokenizer, to train and test with.

klear tiny-model --output data/tiny --family qwen3 --layers 4
klear tiny-model --output examples/tiny_tokenizer --tokenizer-only --force
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_klear.data.tiny import TinyShape, write_tiny_model, write_tiny_tokenizer
from megatron_klear.models.families import FAMILIES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; sizes not given are those of TinyShape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = TinyShape()
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="qwen3")
    parser.add_argument("--hidden", type=int, default=default.hidden_size, help="hidden size")
    parser.add_argument("--ffn", type=int, default=default.ffn_hidden_size, help="hidden size of the MLP")
    parser.add_argument("--layers", type=int, default=default.num_layers)
    parser.add_argument("--heads", type=int, default=default.num_heads)
    parser.add_argument("--kv-heads", type=int, default=default.num_kv_heads)
    parser.add_argument("--head-dim", type=int, default=default.head_dim)
    parser.add_argument("--vocab", type=int, default=default.vocab_size, help="embedding rows, 512 or more")
    parser.add_argument("--max-positions", type=int, default=default.max_positions)
    experts = parser.add_argument_group("families with experts")
    experts.add_argument("--experts", type=int, default=default.num_experts)
    experts.add_argument("--experts-per-token", type=int, default=default.experts_per_token)
    experts.add_argument("--expert-ffn", type=int, default=default.expert_ffn_hidden_size, help="of one expert")
    parser.add_argument("--tied", action="store_true", help="tie the output head to the embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", action="store_true", help='config and tokenizer, for model.weights = "random"')
    parser.add_argument("--tokenizer-only", action="store_true", help="nothing but the tokenizer files")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the folder; exit code 1 with a message where that is refused."""
    options = parse_arguments(arguments)
    shape = TinyShape(
        hidden_size=options.hidden,
        ffn_hidden_size=options.ffn,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=options.vocab,
        max_positions=options.max_positions,
        tied_embeddings=options.tied,
        num_experts=options.experts,
        experts_per_token=options.experts_per_token,
        expert_ffn_hidden_size=options.expert_ffn,
    )
    try:
        if options.tokenizer_only:
            if options.output.exists() and not options.force:
                raise FileExistsError(f"{options.output} exists; choose another folder or pass --force")
            write_tiny_tokenizer(options.output)
        else:
            write_tiny_model(
                options.output,
                options.family,
                shape,
                weights=not options.no_weights,
                seed=options.seed,
                force=options.force,
            )
    except (FileExistsError, ValueError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}")
    return 0
