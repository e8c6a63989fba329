"""A Python whose vLLM is the stand-in of tests/standin, and the processes that a run leaves or has."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

STANDIN = Path(__file__).resolve().parent / "standin"


def write_standin_python(path: Path) -> Path:
    """Write the program to give as `rollout.server.python`; `requests_at` reads what its servers note beside it."""
    work = path.with_name(f"{path.name}-work")
    work.mkdir(exist_ok=True)
    path.write_text(
        f"#!/bin/sh\nSTANDIN_WORK={shlex.quote(str(work))} PYTHONPATH={shlex.quote(str(STANDIN))}:$PYTHONPATH "
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    path.chmod(0o755)
    return path


def requests_at(python: Path, server: int) -> int:
    """Requests under way at a stand-in server, by its process id; 0 where it has noted none."""
    try:
        return int((python.with_name(f"{python.name}-work") / str(server)).read_text() or 0)
    except FileNotFoundError:
        return 0


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
