"""Enter the environment that examples/setup_env.sh makes, from whatever Python a script was started with.

Of the standard library alone, and readable by Pythons older than those that the project runs on: it is what a script
imports first, and what tells a newcomer why nothing else can be imported.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pydantic", "numpy", "torch", "transformers", "megatron")
"""Packages whose absence says that this Python is not the environment's; the doctor looks at all of them."""
ENTERED = "KLEAR_ENTERED_VENV"


@contextmanager
def heavy_imports() -> Iterator[None]:
    """For imports of Megatron: the garbage collector waits meanwhile, and never searches what was imported.

    Else it takes half a second while importing, one at the process's end and a quarter at every save of a checkpoint.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def enter_environment(*, required: bool = True) -> None:
    """Go on in the environment's Python where this one lacks the packages; one line on stderr says so.

    The environment is .venv beside README.md, or the folder that KLEAR_VENV names ("none": this Python or nothing).
    Where there is none, ends the process with exit code 2 and the line that makes it, unless not `required`. Returns
    where the packages are found. A process that is replaced keeps its id, its arguments and its open files.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    venv = os.environ.get("KLEAR_VENV") or str(ROOT / ".venv")
    python = os.path.join(venv, "bin", "python")
    if venv != "none" and os.access(python, os.X_OK) and ENTERED not in os.environ:
        if os.environ.get("RANK", "0") == "0":
            print(
                "going on with " + python + ": " + sys.executable + " has no " + missing[0], file=sys.stderr, flush=True
            )
        os.environ[ENTERED] = venv
        os.execv(python, [python, *_arguments()])
    if required:
        print(
            "error: " + sys.executable + " has no " + ", ".join(missing) + "; `bash examples/setup_env.sh` makes the "
            "environment in .venv, which every script here enters by itself",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _arguments() -> list[str]:
    """What followed the interpreter on the command line, its own options included where this Python tells them."""
    return list(getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:])
