"""The log of a run: metrics.jsonl always, TensorBoard and Weights & Biases as configured, progress for people.

    with open_log(config, rank=rank, total_steps=100, throughput=Throughput(...)) as log:
        with log.time("data"):
            batches = ...
        stats = engine.train_step(batches, loss)
        log.step(stats, capacity_tokens=..., mean_context=...)

Ranks other than 0 get a log without outputs, so that callers need not ask which rank they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from megatron_klear.config.base import RunConfig
from megatron_klear.models.architecture import Architecture
from megatron_klear.runs.metrics_file import MetricsFile, Values
from megatron_klear.runs.mfu import peak_tflops, utilisation
from megatron_klear.runs.progress import open_progress
from megatron_klear.runs.trackers import TensorBoardLog, WandbLog
from megatron_klear.types import StepStats


class Output(Protocol):
    """Something that takes what a run reports."""

    def step(self, step: int, values: Values) -> None:
        """Take the numbers of a finished step."""
        ...

    def validation(self, step: int, values: Values) -> None:
        """Take validation results after a step."""
        ...

    def say(self, text: str) -> None:
        """Take a message for people."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What turns tokens per second into MFU; without a known peak there is no MFU, rather than a zero."""

    architecture: Architecture
    num_devices: int
    peak_tflops: float | None
    frozen: bool = False
    """Whether adapters alone are trained."""

    @classmethod
    def of(cls, config: RunConfig, architecture: Architecture, num_devices: int, device_name: str | None) -> Throughput:
        """From the settings, with the table's peak for bf16 on the GPU named `device_name` (None: no GPU)."""
        known = peak_tflops(device_name) if config.model.dtype == "bf16" else None
        return cls(
            architecture=architecture,
            num_devices=num_devices,
            peak_tflops=config.logging.peak_tflops or known,
            frozen=config.lora is not None,
        )

    def mfu(self, tokens_per_second: float, mean_context: float) -> float | None:
        """Share of the devices' peak, None where it is not known."""
        if self.peak_tflops is None:
            return None
        return utilisation(
            self.architecture,
            tokens_per_second,
            mean_context,
            self.peak_tflops,
            self.num_devices,
            frozen=self.frozen,
        )


class RunLog:
    """Gathers the timings of a step and hands its numbers to all outputs. Use `open_log` to make one."""

    def __init__(
        self,
        outputs: Sequence[Output] = (),
        throughput: Throughput | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._outputs = tuple(outputs)
        self._throughput = throughput
        self._clock = clock
        self._phases: dict[str, float] = defaultdict(float)
        self._outside = 0.0
        self._mark = clock()

    @contextmanager
    def time(self, phase: str, *, outside_step: bool = False) -> Iterator[None]:
        """Time a phase; the next step's record gets it as `seconds/<phase>`.

        `outside_step` leaves it out of the step's own time and throughput: validation, saving.
        """
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._phases[phase] += seconds
            self._outside += seconds if outside_step else 0.0

    def add(self, phase: str, seconds: float) -> None:
        """Count time of a phase that was measured elsewhere."""
        self._phases[phase] += seconds

    def seconds(self, phase: str) -> float:
        """Time spent in a phase since the last step was reported."""
        return self._phases.get(phase, 0.0)

    def start(self) -> None:
        """Begin the time of the first step now, after everything that is done once."""
        self._phases.clear()
        self._outside = 0.0
        self._mark = self._clock()

    def step(self, stats: StepStats, *, capacity_tokens: int | None = None, mean_context: float | None = None) -> None:
        """Report a finished step; its time is what passed since the one before, phases outside of steps excepted.

        `capacity_tokens` is the token budget of the step's rows, for the packing efficiency; `mean_context` what its
        tokens attend to on average, for MFU.
        """
        seconds = self._clock() - self._mark - self._outside
        tokens_per_second = stats.num_tokens / seconds if seconds > 0 else 0.0
        values: dict[str, float | int | bool] = {
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "num_tokens": stats.num_tokens,
            "num_trained_tokens": stats.num_trained_tokens,
            "num_sequences": stats.num_sequences,
            "skipped": stats.skipped,
        }
        if capacity_tokens:
            values["packing_efficiency"] = stats.num_tokens / capacity_tokens
        if self._throughput is not None and mean_context is not None:
            mfu = self._throughput.mfu(tokens_per_second, mean_context)
            values |= {} if mfu is None else {"mfu": mfu}
        values |= stats.metrics
        values |= {f"seconds/{phase}": spent for phase, spent in self._phases.items()}
        for output in self._outputs:
            output.step(stats.step, values)
        self.start()

    def validation(self, step: int, values: Values) -> None:
        """Report validation results, such as `{"loss": 0.7}`, after `step`."""
        for output in self._outputs:
            output.validation(step, values)

    def say(self, text: str) -> None:
        """Tell people something, above the progress bar where there is one."""
        for output in self._outputs:
            output.say(text)

    def close(self) -> None:
        """Flush and close every output."""
        for output in self._outputs:
            output.close()

    def __enter__(self) -> RunLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close on the way out, whatever happened."""
        self.close()


class MetricsFiles:
    """`metrics.jsonl` (one object a step) and `validation.jsonl` (one object a validation) of a run's folder."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._steps = MetricsFile(folder / "metrics.jsonl", resume_step)
        self._validations = MetricsFile(folder / "validation.jsonl", resume_step)

    def step(self, step: int, values: Values) -> None:
        """Append a step."""
        self._steps.write(step, values)

    def validation(self, step: int, values: Values) -> None:
        """Append validation results."""
        self._validations.write(step, values)

    def say(self, text: str) -> None:
        """Messages are for people at the terminal."""

    def close(self) -> None:
        """Close both files."""
        self._steps.close()
        self._validations.close()


def open_log(
    config: RunConfig,
    *,
    rank: int = 0,
    resume_step: int = 0,
    total_steps: int | None = None,
    throughput: Throughput | None = None,
    stream: TextIO | None = None,
) -> RunLog:
    """The log of a run that goes on from `resume_step`; one without outputs on ranks other than 0.

    Raises TrackerError when a tracker that the settings ask for cannot be used.
    """
    if rank != 0:
        return RunLog()
    outputs: list[Output] = [MetricsFiles(config.output, resume_step)]
    if config.logging.tensorboard:
        outputs.append(TensorBoardLog(config.output / "tensorboard", resume_step))
    if config.logging.wandb_project is not None:
        settings = config.model_dump(mode="json")
        outputs.append(WandbLog(config.logging.wandb_project, config.output, settings, resume_step))
    outputs.append(open_progress(total_steps, resume_step, stream))
    return RunLog(outputs, throughput)
