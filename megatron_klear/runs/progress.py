"""Progress for people: a bar where the output is a terminal, one aligned line a step where it is a file."""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from megatron_klear.runs.metrics_file import Values

_WINDOW = 20
"""Steps over which the time of a step is averaged for the time that is left."""


class ProgressLines:
    """One aligned line a step on `stream`."""

    def __init__(self, total_steps: int | None, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._total = total_steps
        self._eta = _Eta(total_steps)

    def step(self, step: int, values: Values) -> None:
        """Show a finished step."""
        self._eta.add(float(values.get("step_seconds", 0.0)))
        self.say("  ".join([_counted(step, self._total), summary(values), f"eta {self._eta.text(step)}"]))

    def validation(self, step: int, values: Values) -> None:
        """Show validation results."""
        self.say(_validation_text(_counted(step, self._total), values))

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


class ProgressBar:
    """A rich bar that stays on the terminal's last line, with what was said and validated above it."""

    def __init__(self, total_steps: int | None, first_step: int = 0, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._total = total_steps
        self._eta = _Eta(total_steps)
        columns = (TextColumn("{task.fields[count]}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
        self._progress: Progress = Progress(*columns, console=Console(file=stream))
        start = _counted(first_step, total_steps)
        self._task: TaskID = self._progress.add_task("", total=total_steps, completed=first_step, count=start, text="")
        self._progress.start()

    def step(self, step: int, values: Values) -> None:
        """Show a finished step."""
        self._eta.add(float(values.get("step_seconds", 0.0)))
        text = f"{summary(values)}  eta {self._eta.text(step)}"
        self._progress.update(self._task, completed=step, count=_counted(step, self._total), text=text)

    def validation(self, step: int, values: Values) -> None:
        """Show validation results above the bar."""
        self.say(_validation_text(_counted(step, self._total), values))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def open_progress(
    total_steps: int | None, first_step: int = 0, stream: TextIO | None = None
) -> ProgressBar | ProgressLines:
    """A bar where `stream` (stdout unless given) is a terminal, lines elsewhere."""
    stream = stream if stream is not None else sys.stdout
    return ProgressBar(total_steps, first_step, stream) if stream.isatty() else ProgressLines(total_steps, stream)


def summary(values: Values) -> str:
    """The numbers of a step that people watch, in columns of constant width."""
    parts = [
        f"loss {values['loss']:8.4f}",
        f"grad {values['grad_norm']:8.3f}",
        f"lr {values['learning_rate']:.2e}",
        f"{values['tokens_per_second']:>9,.0f} tok/s",
    ]
    if "packing_efficiency" in values:
        parts.append(f"fill {values['packing_efficiency']:6.1%}")
    if "mfu" in values:
        parts.append(f"mfu {values['mfu']:5.1%}")
    if values.get("skipped"):
        parts.append("SKIPPED (not finite)")
    return "  ".join(parts)


class _Eta:
    def __init__(self, total_steps: int | None) -> None:
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def text(self, step: int) -> str:
        if self._total is None or not self._seconds:
            return "?"
        left = round(max(self._total - step, 0) * sum(self._seconds) / len(self._seconds))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _counted(step: int, total: int | None) -> str:
    if total is None:
        return f"step {step:>7}"
    return f"step {step:>{len(str(total))}}/{total}"


def _validation_text(head: str, values: Values) -> str:
    return "  ".join([head, "validation", *(f"{name} {value:.4f}" for name, value in values.items())])
