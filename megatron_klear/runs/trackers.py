"""TensorBoard and Weights & Biases, imported when a run asks for them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_klear.config.files import write_text_atomically
from megatron_klear.errors import UserError

if TYPE_CHECKING:
    from megatron_klear.runs.metrics_file import Values


class TrackerError(UserError, RuntimeError):
    """A tracker that the settings ask for and that cannot be used."""


class TensorBoardLog:
    """Scalars under `folder`; events after the step a run is resumed at are hidden, as they come again."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(
                f"logging.tensorboard is on and TensorBoard cannot be imported ({error}): "
                "pip install tensorboard, or set logging.tensorboard = false"
            ) from None
        # Event files of an earlier try exist only where a run is resumed, be it at step 0.
        purge = (resume_step and resume_step + 1) if folder.is_dir() else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)  # type: ignore[no-untyped-call]

    def step(self, step: int, values: Values) -> None:
        """Write a step's numbers under `train/`."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, values: Values) -> None:
        """Write validation results under `validation/`."""
        for name, value in values.items():
            self._writer.add_scalar(f"validation/{name}", value, step)

    def say(self, text: str) -> None:
        """Messages are for people at the terminal."""

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbLog:
    """A Weights & Biases run, continued under its id when the output folder is resumed.

    The service keeps what it was sent first: steps that a resumed run repeats are not sent to it twice.
    """

    def __init__(self, project: str, output: Path, settings: dict[str, Any], resume_step: int = 0) -> None:
        try:
            import wandb
        except ImportError:
            raise TrackerError(
                f"logging.wandb_project is {project!r} and wandb cannot be imported: "
                "pip install 'megatron-klear[wandb]', or leave logging.wandb_project out"
            ) from None
        try:
            self._run: Any = wandb.init(
                project=project,
                name=output.name,
                id=_run_id(output / "wandb_run_id", resume_step),
                resume="allow",
                dir=str(output),
                config=settings,
            )
        except Exception as error:
            raise TrackerError(
                f"logging.wandb_project is {project!r} and Weights & Biases refuses to start: {error}. "
                "Log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def step(self, step: int, values: Values) -> None:
        """Send a step's numbers under `train/`."""
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def validation(self, step: int, values: Values) -> None:
        """Send validation results under `validation/`."""
        self._run.log({f"validation/{name}": value for name, value in values.items()}, step=step)

    def say(self, text: str) -> None:
        """Messages are for people at the terminal."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _run_id(path: Path, resume_step: int) -> str:
    if resume_step > 0 and path.is_file():
        return path.read_text().strip()
    run_id = secrets.token_hex(8)
    write_text_atomically(path, run_id + "\n")
    return run_id
