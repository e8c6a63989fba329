r"""Curate training rows: drop repeated problems and those that overlap with benchmarks, choose, build whole sets.

klear curate deduplicate --input first.jsonl second.jsonl --output runs/curated/distinct/rows.jsonl
klear curate decontaminate --input rows.jsonl --output runs/curated/clean/rows.jsonl --against aime.jsonl
klear curate distill --input rows.jsonl --output runs/curated/sft/rows.jsonl --endpoint.urls http://127.0.0.1:8000/v1 \
    --endpoint.model teacher
klear curate build --config examples/data_math.toml

Each output has a folder of its own: manifest.json, report.json and report.html stand beside it.
docs/curation.md says what they hold and what the rules are.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from megatron_klear.config.base import Settings
from megatron_klear.config.read import SettingsError, from_flags, parse_command_line
from megatron_klear.config.schema import Key, is_list, keys_of, value_type
from megatron_klear.curation.build import plan, run_build
from megatron_klear.curation.build_config import BuildConfig
from megatron_klear.curation.ray_engine import open_engine
from megatron_klear.curation.report import in_words
from megatron_klear.curation.rows import resolve
from megatron_klear.curation.run import Files
from megatron_klear.curation.verbs import VERBS
from megatron_klear.errors import exit_on_error

_TOLD_SECONDS = 0.5
_MIB = 1 << 20
_BUILD = "Make the SFT set, the maths RL set and the code RL set of one TOML file, going on where it was stopped."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the verb's settings are under `settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        does = " ".join((inspect.getdoc(verb.settings) or "").split())
        command = verbs.add_parser(name, help=does[:1].lower() + does[1:].rstrip("."), description=does)
        _add_common(command)
        for key in keys_of(verb.settings).values():
            _add_setting(command, key)
    verbs.add_parser("build", help=_BUILD[:1].lower() + _BUILD[1:].rstrip("."), add_help=False)
    options = parser.parse_args(arguments)
    if not 0 < options.max_row_mib <= 1024:
        parser.error("--max-row-mib must be above 0, at most 1024")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.engine == "ray" and not VERBS[options.verb].on_engine:
        parser.error(
            f"--engine ray would do nothing for {options.verb}: programs and answers are graded, and teachers asked, "
            "by processes of its own; leave it out"
        )
    if options.ray_address and options.engine != "ray":
        parser.error("--ray-address goes with --engine ray")
    try:
        options.settings = _settings(options)
    except SettingsError as error:
        parser.error("\n".join(error.problems))
    return options


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=".jsonl, .parquet or .json, or globs"
    )
    command.add_argument("--output", type=Path, required=True, help=".jsonl or .parquet, alone in its folder")
    command.add_argument("--strict", action="store_true", help="stop at a row that cannot be used")
    command.add_argument("--force", action="store_true", help="replace an existing output")
    command.add_argument("--max-row-mib", type=float, default=16, help="a longer row is left out (default 16)")
    command.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    command.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="whose: this command's, or a Ray's",
    )
    command.add_argument(
        "--ray-address", default="", metavar="ADDRESS", help="a Ray to join, host:port or auto (default: its own)"
    )


def _add_setting(command: argparse.ArgumentParser, key: Key) -> None:
    """A flag whose words `from_flags` reads; dashes for underscores, dots for the keys of a table."""
    kind = value_type(key.annotation)
    default = "" if key.required or key.default in ((), "", None) else f" (default {key.default_text})"
    shape: dict[str, Any] = {"nargs": "+"} if is_list(kind) else {"nargs": "*"} if kind is bool else {"nargs": 1}
    choices = [str(choice) for choice in get_args(kind)] if key.words.startswith("one of") else None
    command.add_argument(
        f"--{key.name.replace('_', '-')}",
        dest=f"of_verb.{key.name}",
        required=key.required,
        choices=choices,
        metavar=None if choices else key.name.rpartition(".")[2].upper(),
        help=f"{key.doc}{default}".replace("%", "%%"),
        **shape,
    )


def _settings(options: argparse.Namespace) -> Settings:
    given = {name.partition(".")[2]: words for name, words in vars(options).items() if name.startswith("of_verb.")}
    flags = {name: words for name, words in given.items() if words is not None}
    return from_flags(VERBS[options.verb].settings, flags, f"klear curate {options.verb}")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do what the command line asks for; returns the report, None where it was done already."""
    with open_engine(options.engine, options.workers, options.ray_address) as engine:
        files = Files(
            inputs=resolve(options.input, "--input"),
            output=options.output,
            strict=options.strict,
            force=options.force,
            max_row_bytes=int(options.max_row_mib * _MIB),
            workers=options.workers,
            engine=engine,
            progress=_progress(),
        )
        return VERBS[options.verb].run(files, options.settings)


def _progress() -> Callable[[int], None]:
    """A counter on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda rows: None
    told = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_SECONDS:
            told = time.monotonic()
            print(f"\r{rows} rows", end="\r", file=sys.stderr, flush=True)

    return tell


def build(arguments: list[str]) -> None:
    """`klear curate build`: sets from one file of settings."""
    command = parse_command_line(BuildConfig, arguments, description="klear curate build\n\n" + _BUILD)
    with exit_on_error():
        if command.dry_run:
            for step in plan(command.config):
                print(f"{step.set_name:8} {step.label:24} {step.files.output}")
            return
        report = run_build(command.config, lambda line: print(line, file=sys.stderr), _progress())
        for name, made in report["sets"].items():
            print(f"{name}: {made['rows']} rows -> {made['file']}")


def main(arguments: list[str] | None = None) -> None:
    """Exit code 1 with a message where a file is wrong or the output exists."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["build"]:
        build(given[1:])
        return
    options = parse_arguments(given)
    with exit_on_error():
        report = run(options)
        if report is None:
            print(f"{options.output} is there already, of these files and settings", file=sys.stderr)
            return
        print(f"{in_words(report)} -> {options.output}", file=sys.stderr)
