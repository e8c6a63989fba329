"""A Python whose vLLM is the stand-in of tests/standin, and the processes that a run leaves or has."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

STANDIN = Path(__file__).resolve().parent / "standin"


def write_standin_python(path: Path) -> Path:
    """Write the program to give as `rollout.server.python`; beside it a server has `drawing.PID` while it draws."""
    path.write_text(
        f"#!/bin/sh\nexport KLEAR_STANDIN_DRAWING={shlex.quote(str(path.parent))}\n"
        f'PYTHONPATH={shlex.quote(str(STANDIN))}:$PYTHONPATH exec {shlex.quote(sys.executable)} "$@"\n'
    )
    path.chmod(0o755)
    return path


def processes_of(folder: Path, *words: str) -> list[int]:
    """Process ids whose command line has `folder` and all `words` in it, this process left out."""
    return processes_with(str(folder), *words)


def processes_with(*words: str) -> list[int]:
    """Process ids whose command line has all `words` in it, this process left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if state != "Z" and int(entry.name) != os.getpid() and all(word in command for word in words):
            found.append(int(entry.name))
    return found
