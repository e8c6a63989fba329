"""Evaluate a model on benchmarks, with intervals, beside what was published.

klear evaluate --config examples/evaluate_gsm8k.toml --model.path runs/quickstart/hf
klear evaluate --config examples/evaluate_gsm8k.toml --endpoint.urls http://127.0.0.1:8000/v1 --endpoint.model mine
klear evaluate --config examples/evaluate_gsm8k.toml --model.path runs/quickstart/hf --long 65536       # by YaRN
klear evaluate --compare runs/evaluate_sft runs/evaluate_gppo              # differences on the same problems
klear evaluate --benchmarks                                                # those that are known by name

An evaluation that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.config.evaluation import EvaluatedModelConfig, EvaluationConfig
from megatron_klear.config.read import parse_command_line
from megatron_klear.errors import UserError, configure_logging, exit_on_error


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
    from megatron_klear.evaluation.run import evaluate
    from megatron_klear.evaluation.sampling import LocalSource, Source
    from megatron_klear.evaluation.table import markdown

    def open_source() -> Source:
        if config.model.path is not None:
            return LocalSource(extended(config), config.thinking)
        from megatron_klear.evaluation.endpoint import EndpointSource

        return EndpointSource(config.endpoint, config.thinking)

    with exit_on_error():
        configure_logging()
        print(markdown(evaluate(config, open_source)))
        print(f"\n{config.output / 'report.html'}")


def extended(config: EvaluationConfig) -> EvaluatedModelConfig:
    """The model to sample from: with `long`, a folder in the output whose config.json extends it."""
    from megatron_klear.models.extend import write_extended

    model = config.model
    if config.long is None or model.path is None:
        return model
    return model.model_copy(update={"path": write_extended(model.path, config.output / "long_model")})


def known_benchmarks() -> str:
    """Every benchmark known by name, with its files."""
    from megatron_klear.evaluation.benchmarks import KNOWN

    return "\n".join(f"{name:18} {benchmark.what}" for name, benchmark in KNOWN.items())
