"""What tests of the sandbox share: what they need, and a user that is not root to run as."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_klear.rewards.sandbox.command import interpreter
from megatron_klear.rewards.sandbox.inside import landlock
from megatron_klear.rewards.sandbox.outcome import DEFAULT_LIMITS, Limits, Outcome, Program, Sandbox

ROOT = Path(__file__).resolve().parent.parent
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
needs_landlock = pytest.mark.skipif(
    landlock.version() < landlock.NEEDED_VERSION, reason=f"the kernel has no Landlock {landlock.NEEDED_VERSION}"
)
KINDS = [
    pytest.param("bubblewrap", marks=needs_bubblewrap),
    pytest.param("landlock", marks=needs_landlock),
]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="another user can be had as root alone, with setpriv"
)
_USER = "60123"
_AS_ANOTHER = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/python /mnt/code /mnt/packages
mount --bind "$1" /mnt/python
mount --bind "$2" /mnt/code
mount --bind "$3" /mnt/packages
cd /
user="$4" executable="/mnt/python/$5"
eval "$6"
shift 6
exec setpriv --reuid "$user" --regid "$user" --clear-groups env -i PATH="$PATH" \\
    PYTHONPATH=/mnt/code:/mnt/packages "$executable" -B "$@"
"""


def one(sandbox: Sandbox, source: str, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """What comes of a program on one input."""
    (outcome,) = sandbox.run(Program(source=source), [stdin], limits=limits)
    return outcome


def as_another_user(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout as a user that is not root and may reach neither root's home nor its files.

    The interpreter, the checkout and the packages are where that user reads them, in mounts of the process's own;
    `before` is what root does there first.
    """
    import numpy

    prefix = Path(sys.base_prefix).resolve()
    packages = Path(numpy.__file__).parent.parent
    executable = str(interpreter().relative_to(prefix))
    places = [str(prefix), str(ROOT), str(packages), _USER, executable, before]
    command = ["unshare", "--mount", "bash", "-c", _AS_ANOTHER, "bash", *places, *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=300)


def told(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a process printed; a test skips where this root may not mount."""
    if ran.returncode and "unshare" in ran.stderr and "Operation not permitted" in ran.stderr:
        pytest.skip("this root may not mount")
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found
