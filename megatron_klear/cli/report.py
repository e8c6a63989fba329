"""Write one self-contained HTML page about a run, or about several compared: curves, settings, rollouts to read.

    klear report runs/gppo --out report.html
    klear report runs/gppo runs/ppo --out compared.html --title "GPPO against PPO" --png figures

A run is its output folder: metrics.jsonl, and where they are there validation.jsonl, config.toml and rollouts/. The
page needs no network and stays under 5 MB; long rollouts are shown without their middle. A run that is still going on
can be looked at too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_klear.errors import exit_on_error
from megatron_klear.runs.report import write_report


def main(arguments: list[str] | None = None) -> None:
    """Write the page; exit code 1 with a message where a folder is not a run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="the page to write")
    parser.add_argument("--title", help="heading of the page; the runs' names when not given")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write the charts as PNG files into this folder")
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="rollouts shown of a step (default 12)")
    options = parser.parse_args(arguments)
    with exit_on_error():
        page = write_report(
            options.runs, options.out, title=options.title, png=options.png, samples_per_step=options.samples
        )
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
