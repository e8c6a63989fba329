"""One HTML file that tells how runs went: their curves, their settings, and rollouts to read.

    write_report(["runs/gppo"], "report.html")
    write_report(["runs/gppo", "runs/ppo"], "compared.html", title="GPPO against PPO", png="figures")

The page needs no network: data, styles and scripts are in it.
"""

from megatron_klear.runs.report.page import write_report
from megatron_klear.runs.report.runs import ReportError

__all__ = ["ReportError", "write_report"]
