"""Evaluate a model on benchmarks, with intervals, beside what was published.

klear evaluate --config examples/evaluate_gsm8k.toml --model.path runs/quickstart/hf
klear evaluate --config examples/evaluate_gsm8k.toml --endpoint.urls http://127.0.0.1:8000/v1 --endpoint.model mine
klear evaluate --config examples/evaluate_aime.toml --model.path FOLDER --long 65536                       # by YaRN
klear evaluate --compare runs/evaluate_sft runs/evaluate_gppo              # differences on the same problems
klear evaluate --benchmarks                                                # those that are known by name

torchrun --nproc-per-node 8 evaluate.py --config ... --model.path FOLDER   # a copy of the model on each GPU

An evaluation that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_klear.config.evaluation import EvaluatedModelConfig, EvaluationConfig
from megatron_klear.config.read import parse_command_line
from megatron_klear.errors import UserError, configure_logging, exit_on_error

if TYPE_CHECKING:
    from megatron_klear.evaluation.sampling import Source


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, grade, count, or compare what was counted; print the table."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv[:1] == ["--compare"]:
        from megatron_klear.evaluation.table import comparison

        with exit_on_error():
            if len(argv) < 3:
                raise UserError("--compare takes two folders of evaluations or more, the first to compare with")
            print(comparison([Path(folder) for folder in argv[1:]]))
        return
    if argv == ["--benchmarks"]:
        print(known_benchmarks())
        return
    command = parse_command_line(EvaluationConfig, argv, description=__doc__)
    config = command.config
    with exit_on_error():
        configure_logging()
        if command.dry_run:
            if os.environ.get("RANK", "0") == "0":
                print(plan(config))
        elif config.model.path is None:
            from megatron_klear.evaluation.endpoint import EndpointSource

            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError("an endpoint is asked by one process: start evaluate.py without torchrun")
            report(config, lambda: EndpointSource(config.endpoint, config.thinking))
        else:
            from megatron_klear.evaluation.processes import joined, on_all
            from megatron_klear.evaluation.sampling import LocalSource

            with joined():
                on_all(partial(report, config), lambda: LocalSource(extended(config), config.thinking))


def report(config: EvaluationConfig, open_source: Callable[[], Source]) -> None:
    """Evaluate, and print the table and where the page is."""
    from megatron_klear.evaluation.run import evaluate
    from megatron_klear.evaluation.table import markdown

    print(markdown(evaluate(config, open_source)))
    print(f"\n{config.output / 'report.html'}")


def plan(config: EvaluationConfig) -> str:
    """What would be drawn, a line a benchmark; reads the benchmarks and a model's settings, not its weights.

    Raises UserError where a folder is no model, or no response so long fits into it.
    """
    from megatron_klear.evaluation.benchmarks import read_benchmark
    from megatron_klear.evaluation.run import protocol_of

    positions = None if config.model.path is None else _positions(config.model.path, config.long is not None)
    lines = []
    for benchmark in config.benchmarks:
        problems, protocol = len(read_benchmark(benchmark)), protocol_of(config, benchmark)
        if positions is not None:
            protocol.local()  # which says what the local engine lacks
            if protocol.max_tokens >= positions:
                raise UserError(
                    f"{benchmark.name}: a prompt and a response of {protocol.max_tokens} go beyond the model's "
                    f"{positions} positions: lower --sampling.max-tokens, or extend the model (--long, klear extend)"
                )
        lines.append(
            f"{benchmark.name}: {problems} problems x {protocol.samples} = {problems * protocol.samples:,} responses, "
            f"{protocol.words()}"
        )
    return "\n".join(lines)


def extended(config: EvaluationConfig) -> EvaluatedModelConfig:
    """The model to sample from: with `long`, a folder in the output whose config.json extends it."""
    from megatron_klear.distributed import exchange
    from megatron_klear.models.extend import write_extended

    model, path = config.model, config.model.path
    if config.long is None or path is None:
        return model
    long = exchange.from_first_rank(lambda: write_extended(path, config.output / "long_model"))
    return model.model_copy(update={"path": long})


def _positions(folder: Path, long: bool) -> int:
    """Those of the model that would be sampled from."""
    from megatron_klear.models.architecture import read_architecture
    from megatron_klear.models.extend import PAPER_FACTOR, extended_config

    positions = read_architecture(folder).max_positions
    if not long:
        return positions
    path = folder / "config.json"
    return int(extended_config(json.loads(path.read_text()), PAPER_FACTOR, None, str(path))["max_position_embeddings"])


def known_benchmarks() -> str:
    """Every benchmark known by name, with its files."""
    from megatron_klear.evaluation.benchmarks import KNOWN

    return "\n".join(f"{name:18} {benchmark.what}" for name, benchmark in KNOWN.items())
