"""The stages of examples/quickstart.sh, SFT and GPPO, then the evaluation of both models: summary.json and two reports.

python tools/quickstart.py --seed 0 --seconds-before 90
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_klear.cli.environment import enter_environment

enter_environment()

from megatron_klear.config.files import write_text_atomically
from megatron_klear.errors import exit_on_error
from megatron_klear.evaluation.table import comparison
from megatron_klear.runs.report import write_report

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/quickstart")
STAGES = (
    ("pretrain_sft.py", "--config", "examples/quickstart_sft.toml"),
    ("train_gppo.py", "--config", "examples/quickstart_gppo.toml"),
)
EVALUATION = "examples/quickstart_evaluate.toml"
EVALUATED = {"sft": "runs/quickstart_sft/hf", "gppo": "runs/quickstart/hf"}
EVALUATIONS = Path("runs/quickstart_evaluation")
KIB = 1024


def resident_bytes(session: int) -> int:
    """Resident memory of all processes of a session, shared pages counted in each; 0 where there is no /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                total += int(status.get("VmRSS", "0 kB").split()[0]) * KIB
        except OSError:  # it has ended
            continue
    return total


def run_stage(command: list[str]) -> int:
    """Run one stage to its end; the most memory that its processes held together, looked at twice a second.

    Exits with the stage's code where it fails.
    """
    peak = 0
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as stage:
        try:
            while stage.poll() is None:
                peak = max(peak, resident_bytes(stage.pid))
                time.sleep(0.5)
        except KeyboardInterrupt:
            stage.terminate()
            raise
    if stage.returncode:
        raise SystemExit(stage.returncode)
    return peak


def main() -> None:
    """Run the stages, write the summary and the report, print where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds-before", type=float, default=0.0, help="spent before this was started")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="to train on, instead of the settings' CPU")
    options = parser.parse_args()
    device = ("--parallel.device", options.device) if options.device else ()
    start = time.monotonic() - options.seconds_before
    peak = max(run_stage([sys.executable, *stage, "--seed", str(options.seed), *device]) for stage in STAGES)
    for name, model in EVALUATED.items():
        flags = ("--output", str(EVALUATIONS / name), "--model.path", model, "--seed", str(options.seed))
        peak = max(peak, run_stage([sys.executable, "evaluate.py", "--config", EVALUATION, *flags]))
    run = ROOT / RUN
    validations = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    with exit_on_error():
        write_report([run], run / "report.html", title="Quickstart: GPPO on sums")
        compared = comparison([ROOT / EVALUATIONS / name for name in EVALUATED])
    summary = {
        "accuracy_sft": validations[0]["accuracy"],
        "accuracy_gppo": validations[-1]["accuracy"],
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak,
    }
    write_text_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\nright answers to held-out sums: {summary['accuracy_sft']:.1%} after SFT, ", end="")
    print(f"{summary['accuracy_gppo']:.1%} after GPPO; {summary['seconds']:.0f} s in all")
    print(f"{compared}\n\n{RUN / 'summary.json'}\n{RUN / 'report.html'}\n{EVALUATIONS / 'gppo' / 'report.html'}")


if __name__ == "__main__":
    main()
