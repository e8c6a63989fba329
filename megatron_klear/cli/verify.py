"""Prove on this machine, with this model, that layouts agree, that a resumed run is the uninterrupted one, and that
the rollout engine samples from the policy in training.

klear verify layouts --config run.toml                       # a table, exit code 1 on a breach
klear verify layouts --config run.toml --batch data --loss gppo --fused both --processes 4
torchrun --nproc-per-node 8 -m megatron_klear.cli verify layouts --config run.toml  # within these 8 processes
klear verify resume --config run.toml --kills 5 --steps 12   # SIGKILL at random instants
klear verify weights --config gppo.toml                      # do the weights reach the rollout engine
klear verify mismatch --config gppo.toml                     # why sampler and trainer disagree, if they do

Settings are overridden as for the training script: --model.dtype fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.start import start_gppo, start_with
from megatron_klear.errors import exit_on_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verification: 0 when all is equal, 1 on a breach or an error, 2 on bad settings."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"layouts": layouts, "resume": resume, "weights": weights, "mismatch": mismatch}
    if not words or words[0] not in commands:
        asked = bool(words) and words[0] in ("--help", "-h")
        print(__doc__.strip(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    with exit_on_error():
        return commands[words[0]](words[1:])


def layouts(words: Sequence[str]) -> int:
    """Compare layouts, print the table."""
    parser = _parser("layouts", "run a batch through every layout and compare with one process")
    parser.add_argument("--steps", type=_count, default=5, help="optimizer steps (default 5)")
    parser.add_argument("--loss", choices=("nll", "gppo"), default="nll")
    parser.add_argument("--batch", choices=("builtin", "data"), default="builtin", help="random samples or data.train")
    parser.add_argument("--fused", choices=("config", "both"), default="config", help="also compare fused and unfused")
    parser.add_argument("--tolerance", type=float, help="relative, of loss and gradient norm (default by model.dtype)")
    parser.add_argument("--processes", type=_count, default=8, help="most processes a layout may take (default 8)")
    options, settings = parser.parse_known_args(words)
    start = start_with(settings, processes=None, files=options.batch == "data")

    from megatron_klear.data.store import open_store
    from megatron_klear.verify.layout_report import TOLERANCES, verify_layouts
    from megatron_klear.verify.layouts import ragged_samples, stored_samples

    config = start.config
    if options.batch == "data":
        samples = stored_samples(open_store(config.data, config.model.path, "train"), config.data.max_length)
    else:
        samples = ragged_samples(start.architecture.vocab_size, longest=min(config.data.max_length, 512))
    tolerance = TOLERANCES[config.model.dtype] if options.tolerance is None else options.tolerance
    report = verify_layouts(
        config,
        start.architecture,
        samples,
        steps=options.steps,
        loss=options.loss,
        fused=options.fused,
        tolerance=tolerance,
        most_processes=options.processes,
        told=_tell,
    )
    rows = [_layout_cells(row) for row in report.rows]
    header = ("layout", "processes", "loss", "grad norm", "log-probs", "verdict")
    verdict = (
        f"compared with {report.reference}: {len(samples)} samples, {options.steps} steps, {options.loss}, "
        f"{config.model.dtype}; tolerance {tolerance:g} relative, log-probs {10 * tolerance:g} nats"
    )
    return _finish(options.json, header, rows, verdict, report.passed, dataclasses.asdict(report))


def resume(words: Sequence[str]) -> int:
    """Compare a killed and resumed run with an uninterrupted one, print the table."""
    parser = _parser("resume", "train uninterrupted, and killed at random instants; compare everything")
    parser.add_argument("--steps", type=_count, default=12, help="optimizer steps (default 12)")
    parser.add_argument("--kills", type=_count, default=5, help="SIGKILLs (default 5)")
    parser.add_argument("--processes", type=_count, help="processes of the run (default: one model replica)")
    parser.add_argument("--layouts", nargs="*", default=["TP2", "DP2"], help="other layouts to go on in")
    parser.add_argument("--tolerance", type=float, help="relative, in those (default by model.dtype)")
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: beside output)")
    options, settings = parser.parse_known_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("verify resume starts and kills its own processes; call it without torchrun", file=sys.stderr)
        return 2
    start = start_with(settings, processes=options.processes, files=True)

    from megatron_klear.verify.layout_report import TOLERANCES
    from megatron_klear.verify.layouts import layouts_named
    from megatron_klear.verify.resume import verify_resume

    report = verify_resume(
        start,
        steps=options.steps,
        kills=options.kills,
        layouts=layouts_named(options.layouts),
        tolerance=TOLERANCES[start.config.model.dtype] if options.tolerance is None else options.tolerance,
        folder=options.folder,
        told=_tell,
    )
    rows = [(check.name, _verdict(check.passed), check.detail) for check in report.checks]
    verdict = f"{options.steps} steps on {start.world_size} processes, {start.config.model.dtype}"
    verdict += f"; the runs and their logs are in {report.folder}" if report.folder else ""
    return _finish(
        options.json, ("check", "verdict", "found"), rows, verdict, report.passed, dataclasses.asdict(report)
    )


def weights(words: Sequence[str]) -> int:
    """Send the weights to the rollout engine and compare, print the table."""
    return _rollouts("weights", "send the weights to the rollout engine, compare checksums, echo one row", words)


def mismatch(words: Sequence[str]) -> int:
    """Compare log-probs of sampler and trainer, print a verdict on every cause."""
    return _rollouts("mismatch", "sample a few prompts and say why sampler and trainer disagree, if they do", words)


def _rollouts(command: str, description: str, words: Sequence[str]) -> int:
    parser = _parser(command, description)
    parser.add_argument("--tolerance", type=float, help="mean difference of log-probs, nats (default by model.dtype)")
    if command == "mismatch":
        parser.add_argument("--prompts", type=_count, default=4, help="prompts to sample (default 4)")
    options, settings = parser.parse_known_args(words)
    start = start_gppo(settings)

    from megatron_klear.verify.rollouts import verify_mismatch, verify_weights

    if command == "weights":
        report = verify_weights(start, options.tolerance)
    else:
        report = verify_mismatch(start, options.prompts, options.tolerance)
    rows = [(finding.cause, finding.verdict, finding.detail) for finding in report.findings]
    verdict = f"mean difference of log-probs {report.mean:.2e} over {report.tokens} tokens, limit {report.tolerance:g}"
    return _finish(options.json, ("cause", "verdict", "seen"), rows, verdict, report.passed, dataclasses.asdict(report))


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"verify {command}",
        description=description,
        epilog="Further flags are settings of the run: --config FILE, --table.key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return number


def _layout_cells(row: Any) -> tuple[str, ...]:
    if row.comparison is None:
        told = row.reason if row.reason == "reference" else f"not possible: {row.reason}"
        return (row.name, str(row.processes), "", "", "", told)
    numbers = (row.comparison.loss, row.comparison.grad_norm, row.comparison.logprobs)
    return (row.name, str(row.processes), *(f"{number:.1e}" for number in numbers), _verdict(row.passed))


def _verdict(passed: bool | None) -> str:
    return {True: "equal", False: "DIFFERENT", None: "not run"}[passed]


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _finish(
    json_file: Path | None,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    verdict: str,
    passed: bool,
    record: dict[str, Any],
) -> int:
    from megatron_klear.verify.table import aligned

    if os.environ.get("RANK", "0") == "0":
        print(aligned(header, rows))
        print(f"{'passed' if passed else 'FAILED'}: {verdict}", flush=True)
        if json_file is not None:
            write_text_atomically(json_file, json.dumps({"passed": passed, **record}, indent=1, default=str) + "\n")
    return 0 if passed else 1
