"""Show a tokenized sample with the tokens that are trained coloured, and the counts of the whole split.

klear inspect-data --config examples/sft_tiny_cpu.toml --index 3
klear inspect-data --data 'rows/*.jsonl' --tokenizer path/to/model --turns last

On a terminal trained text is green; elsewhere it stands between ⟦ and ⟧.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_klear.config.base import DataConfig
from megatron_klear.data.store import TokenStore, open_store
from megatron_klear.data.tokenize_pool import mask_to_spans
from megatron_klear.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_klear.types import Sample


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="TOML file of a run: its [data] table and model.path")
    parser.add_argument("--data", nargs="+", help="data files or globs, instead of data.train")
    parser.add_argument("--tokenizer", type=Path, help="model folder, instead of model.path")
    parser.add_argument("--template", type=Path, help="Jinja file, instead of data.chat_template")
    parser.add_argument("--turns", choices=("all", "last"), help="instead of data.trained_turns")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--index", type=int, default=0, help="which sample to show")
    parser.add_argument("--tokens", action="store_true", help="one line a token, with its id")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace, cache: Path) -> tuple[DataConfig, Path]:
    """The data settings and the model folder that the command line asks for.

    Without --config nothing is left behind: tokenized data goes to the folder `cache`.
    """
    run: dict[str, Any] = tomllib.loads(options.config.read_text(encoding="utf-8")) if options.config else {}
    data = dict(run.get("data", {"cache": cache}))
    given = {"train": options.data, "chat_template": options.template, "trained_turns": options.turns}
    data |= {key: value for key, value in given.items() if value is not None}
    folder = options.tokenizer or run.get("model", {}).get("path")
    if folder is None or "train" not in data:
        raise ValueError("name a run's TOML file with --config, or --data and --tokenizer")
    return DataConfig.model_validate(data), Path(folder)


def show(sample: Sample, tokenizer: ChatTokenizer, *, coloured: bool) -> str:
    """The text of a sample with its trained parts in green, or between ⟦ and ⟧."""
    opening, closing = ("\033[32m", "\033[0m") if coloured else ("⟦", "⟧")
    parts, position = [], 0
    for start, end in mask_to_spans(sample.trained):
        parts.append(tokenizer.decode(sample.tokens[position:start]))
        parts.append(opening + tokenizer.decode(sample.tokens[start:end]) + closing)
        position = end
    return "".join([*parts, tokenizer.decode(sample.tokens[position:])])


def show_tokens(sample: Sample, tokenizer: ChatTokenizer) -> str:
    """One line a token: position, id, a star where it is trained, text."""
    rows = zip(sample.tokens.tolist(), sample.trained.tolist(), strict=True)
    return "\n".join(f"{i:6d} {t:8d} {'*' if on else ' '} {tokenizer.decode([t])!r}" for i, (t, on) in enumerate(rows))


def describe(store: TokenStore) -> str:
    """Counts of a split: what became of the rows, and how long the samples are."""
    median, high = (int(np.percentile(store.lengths, q)) for q in (50, 90))
    return (
        f"{store.summary}\nlengths of this split: median {median}, 90 % below {high}, longest {store.lengths.max()}; "
        f"{int(store.trained_counts.sum(dtype=np.int64))} of {int(store.lengths.sum(dtype=np.int64))} tokens trained"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print a sample; exit code 1 with a message where data or settings are wrong."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config, folder = settings(options, Path(scratch))
            store = open_store(config, folder, options.split)
            if not 0 <= options.index < len(store):
                raise ValueError(f"--index {options.index}: the split has samples 0 to {len(store) - 1}")
            tokenizer = load_tokenizer(folder, config.chat_template)
        except (OSError, ValueError) as error:
            print(f"inspect_data: {error}", file=sys.stderr)
            return 1
        sample = store[options.index]
        print(f"sample {options.index} of {len(store)}, from {store.origin(options.index)}:", end=" ")
        print(f"{len(sample.tokens)} tokens, {int(sample.trained.sum())} trained\n")
        coloured = sys.stdout.isatty()
        print(show_tokens(sample, tokenizer) if options.tokens else show(sample, tokenizer, coloured=coloured))
        print(f"\n{describe(store)}")
    return 0
