"""Run one of the paper's ablations: every arm over several seeds, its claims judged with intervals.

klear ablate --list
klear ablate examples/ablations/clip.toml                          # at the scale `tiny`, on a CPU
klear ablate examples/ablations/clip.toml --seeds 0 1 --train.steps 20
klear ablate examples/ablations/clip.toml --scale 8b --dry-run     # the commands, and the plan of each
klear ablate --summary examples/ablations/results                  # claims and verdicts of several, as a table

Leaves result.json, report.md and plot.png in RUNS/NAME. Flags that are not listed below go to the last stage that
trains, for all arms alike. Stopped at any time, it goes on where it was; --known takes runs of another day or machine
from their result.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.ablations.outcome import Outcome, as_json, judge, read_known, read_outcome
from megatron_klear.ablations.plan import AblationError, ArmRun, Preparation, arm_runs, preparations
from megatron_klear.ablations.report import markdown, summary, write_plot
from megatron_klear.ablations.run import owned, prepare, run_all
from megatron_klear.config.ablation import AblationConfig, Scale
from megatron_klear.config.base import Settings, SFTConfig
from megatron_klear.config.evaluation import EvaluationConfig
from megatron_klear.config.files import write_text_atomically
from megatron_klear.config.read import exit_on_bad_input, load
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.errors import configure_logging, exit_on_error

RECIPES = Path("examples/ablations")
SETTINGS: dict[str, type[Settings]] = {"sft": SFTConfig, "gppo": GPPOConfig, "evaluate": EvaluationConfig}


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known goes to training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="a TOML file of examples/ablations")
    parser.add_argument("--list", action="store_true", help="the recipes of examples/ablations")
    parser.add_argument(
        "--summary", type=Path, metavar="FOLDER", help="verdicts of the results in it, NAME/result.json"
    )
    parser.add_argument("--scale", default="tiny", help="one of the recipe's scales (default tiny)")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the scale's own")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of all ablations")
    parser.add_argument(
        "--known", type=Path, help="a result.json whose runs, by the same commands, are taken as they are"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options, more = parser.parse_known_args(arguments)
    if not options.list and options.recipe is None and options.summary is None:
        parser.error("name a recipe, or --list them")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options, more


def main(arguments: list[str] | None = None) -> None:
    """Run, judge, write; exit code 1 with a message where a run fails."""
    options, more = parse_arguments(arguments)
    if options.list:
        print(listing(RECIPES))
        return
    if options.summary is not None:
        with exit_on_error():
            print(summary(options.summary))
        return
    with exit_on_bad_input():
        config = load(AblationConfig, ["--config", str(options.recipe)])
    with exit_on_error():
        configure_logging()
        scale = config.scales.get(options.scale)
        if scale is None:
            raise AblationError(f"{options.recipe} has no scale {options.scale!r}: {', '.join(config.scales)}")
        config = config.at(scale)
        name = options.recipe.stem if options.scale == "tiny" else f"{options.recipe.stem}_{options.scale}"
        seeds = tuple(options.seeds or scale.seeds)
        planned = arm_runs(config, scale, name, options.runs, seeds, tuple(more))
        wanted = preparations(scale, config.arms, options.runs)
        if options.dry_run:
            for one in wanted:
                print("klear", shlex.join(one.arguments))
            for run in planned:
                print("\n".join(f"klear {shlex.join(stage)}" for stage in run.stages))
            return
        known = read_known(options.known, planned, config.measure, wanted) if options.known else {}
        if options.known:
            print(f"{len(known)} of {len(planned)} runs are known", flush=True)
        left = [run for run in planned if (run.arm, run.seed) not in known]
        with owned(options.runs / name):
            if left:
                check_settings(left)
                with owned(options.runs / "shared"):
                    prepare(wanted)
                run_all(left, options.jobs)
            outcomes = [known.get((run.arm, run.seed)) or read_outcome(run, config.measure) for run in planned]
            print(conclude(config, scale, options.scale, outcomes, wanted, options.runs / name))


def check_settings(planned: Sequence[ArmRun]) -> None:
    """End with what is wrong with the settings of a stage, before anything is made for the first."""
    with exit_on_bad_input():
        for one in planned:
            for command, *flags in one.stages:
                load(SETTINGS[command], flags)


def conclude(
    config: AblationConfig,
    scale: Scale,
    scale_name: str,
    outcomes: list[Outcome],
    prepared: list[Preparation],
    folder: Path,
) -> str:
    """Judge, write the three files; returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    judged = judge(config, outcomes)
    report = markdown(config, scale, outcomes, judged)
    content = as_json(config, scale_name, outcomes, judged, prepared)
    write_text_atomically(folder / "result.json", json.dumps(content, indent=1) + "\n")
    write_plot(config, outcomes, folder / "plot.png")
    write_text_atomically(folder / "report.md", report)
    return report


def listing(folder: Path) -> str:
    """Every recipe with its title."""
    with exit_on_bad_input():
        found = {path: load(AblationConfig, ["--config", str(path)]) for path in sorted(folder.glob("*.toml"))}
    return "\n".join(f"{path!s:45} {config.title}" for path, config in found.items())
