"""One run an output folder: refused while it lives, free as soon as its process is gone, whatever it forked."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.config.checks import check_launch
from megatron_klear.runs import owner as owner_module
from megatron_klear.runs.owner import FolderInUse, owned

HOLDS = """
import os, sys, time
from pathlib import Path
from megatron_klear.runs.owner import owned
with owned(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        sys.stdin.read()  # outlives its parent, until the test closes the pipe
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


def test_refused_while_the_owner_lives_and_free_after_its_kill_though_a_child_lives(tmp_path: Path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        told = f"process {owner.pid} on {socket.gethostname()}, since 2"
        with pytest.raises(FolderInUse, match=told) as refused, owned(tmp_path):
            pass
        assert refused.value.exit_code == 2
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        os.kill(child, 0)  # alive
        with owned(tmp_path):
            assert json.loads((tmp_path / ".owner").read_bytes())["pid"] == os.getpid()


def test_without_locks_a_file_stands_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", none)
    held = tmp_path / ".owner.held"
    with owned(tmp_path):
        content = json.loads(held.read_bytes())
        with pytest.raises(FolderInUse, match=f"remove {held}"), owned(tmp_path):
            pass
    assert not held.exists()
    held.write_text(json.dumps(content | {"ticks": "1"}))  # the process id was given to another process since
    with owned(tmp_path):
        pass
    held.write_text(json.dumps(content | {"ticks": "1", "host": "another"}))  # of it nothing is known here
    with pytest.raises(FolderInUse), owned(tmp_path):
        pass


def test_an_owner_without_locks_that_ends_meanwhile_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held, read = tmp_path / ".owner.held", Path.read_bytes
    held.touch()

    def ended(path: Path) -> bytes:
        path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", ended)
    assert owner_module._hold_by_file(tmp_path) == held
    assert held.exists()


def test_of_two_runs_that_find_a_dead_owner_without_locks_one_has_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held, is_gone, others = tmp_path / ".owner.held", owner_module._is_gone, [tmp_path]
    gone = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2", "ticks": "1"}
    held.write_text(json.dumps(gone))

    def taken_over_meanwhile(content: bytes) -> bool:
        found = is_gone(content)
        if others:
            owner_module._hold_by_file(others.pop())
        return found

    monkeypatch.setattr(owner_module, "_is_gone", taken_over_meanwhile)
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        owner_module._hold_by_file(tmp_path)
    assert json.loads(held.read_bytes())["ticks"] != "1"
    assert list(tmp_path.iterdir()) == [held]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "srun started 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2"),
        ({"PMI_SIZE": "2"}, "mpiexec started 2"),
        ({"SLURM_NTASKS": "8"}, None),  # the batch script itself
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, None),  # torchrun on every node
        ({"PMI_SIZE": "1"}, None),
    ],
)
def test_a_launcher_of_many_worlds_of_one_is_told(environment: dict[str, str], told: str | None):
    problems = check_launch(environment)
    assert (told in problems[0]) if told else not problems
