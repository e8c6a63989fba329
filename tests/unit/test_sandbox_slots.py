"""Slots of the sandbox: what tests that share a process leave, how a slot is lost, comes back and ends."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.sandbox import Program, open_sandbox
from tests.hostile_runs import HONEST, INPUTS, alive, descendants, right
from tests.sandboxes import KINDS, ROOT, one


def test_early_stop(slot):
    asked = []

    def enough(index, outcome):
        asked.append(index)
        return index == 1

    outcomes = slot.run(Program(source="print(input())"), [b"a", b"b", b"c"], enough=enough)
    assert [o.status for o in outcomes] == ["done", "done", "skipped"]
    assert asked == [0, 1]
    assert slot.run(HONEST, []) == []


COUNTS = "import builtins\nbuiltins.seen = getattr(builtins, 'seen', 0) + 1\nprint({})"


def test_state_left_over_decides_nothing(slot):
    """What a program of many tests leaves in its process is gone in the run that counts."""
    outcomes = slot.run(
        Program(source=COUNTS.format("builtins.seen")), [b""] * 4, passed=lambda i, o: o.stdout == b"1\n"
    )
    assert [o.stdout for o in outcomes] == [b"1\n"] * 4


def test_only_a_pass_is_believed_where_a_process_is_shared(slot):
    asked = []

    def passed(index, outcome):
        asked.append(index)
        return outcome.stdout == str(index + 1).encode() + b"\n"

    outcomes = slot.run(Program(source=COUNTS.format("builtins.seen")), [b""] * 3, passed=passed)
    assert [o.stdout for o in outcomes] == [b"1\n", b"2\n", b"3\n"]  # right answers, however it came to them
    outcomes = slot.run(Program(source=COUNTS.format("9 if builtins.seen > 1 else 1")), [b""] * 3, passed=passed)
    assert [o.stdout for o in outcomes] == [b"1\n"] * 3
    assert asked == [0, 1, 2, 0, 1]  # after the first that fails every test has a process of its own


def test_a_failure_of_the_first_test_counts_at_once(slot):
    source = "import os\nprint(os.getpid())\nexit(1)"
    outcomes = slot.run(Program(source=source), [b""] * 2, passed=lambda i, o: False)
    assert [o.note for o in outcomes] == ["exit 1"] * 2


def test_a_lost_slot_costs_one_sample_and_starts_again(slot):
    assert right(0, slot.run(HONEST, INPUTS)[0])
    starts, processes = slot.starts, set()

    def kill(index, outcome):
        processes.update(descendants(slot.process_id))
        for process_id in processes:
            with contextlib.suppress(ProcessLookupError):  # the first takes the others with it
                os.kill(process_id, signal.SIGKILL)
        return True

    outcomes = slot.run(HONEST, INPUTS, passed=kill)
    assert [o.status for o in outcomes] == ["done", "contained"]
    after = slot.run(HONEST, INPUTS)
    assert all(right(index, outcome) for index, outcome in enumerate(after))
    assert slot.starts == starts + 1
    assert not alive(processes)


def test_a_slot_killed_between_programs_is_not_missed(slot):
    slot.run(HONEST, INPUTS)
    os.kill(slot.process_id, signal.SIGKILL)
    os.waitid(os.P_PID, slot.process_id, os.WEXITED | os.WNOWAIT)
    assert right(0, slot.run(HONEST, INPUTS)[0])


class _TimeIsUp(BaseException):
    pass


def test_a_slot_that_is_interrupted_starts_again(slot):
    """As the grading worker does it, at any point, when a response's time is up."""

    def raise_time_is_up(*_):
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, raise_time_is_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(_TimeIsUp):
            one(slot, "import time\ntime.sleep(99)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert slot.process_id is None
    assert right(0, slot.run(HONEST, INPUTS)[0])


WORKER = """
import sys
from megatron_klear.rewards.sandbox import Program, open_sandbox
sandbox = open_sandbox(sys.argv[1])
def told(index, outcome):
    print(sandbox.process_id, flush=True)
sandbox.run(Program(source="import time\\nif input():\\n    time.sleep(99)"), [b"\\n", b"x"], enough=told)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_takes_its_slot_with_it(kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WORKER, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        processes = descendants(int(worker.stdout.readline()))
        handles = [os.pidfd_open(process_id) for process_id in processes]
        worker.kill()
    for handle in handles:
        assert_ends(handle)
    assert len(handles) >= 2


def assert_ends(handle, seconds=20):
    """The process of a pidfd ends within some seconds."""
    import select

    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = poll.poll(1000 * seconds)
    os.close(handle)
    assert ended, "a process has outlived its worker"


ORPHANED = """
import os
from types import SimpleNamespace
from megatron_klear.rewards.sandbox.inside import keeper, landlock, runner, system

def until_the_keeper_is_gone():
    while os.getppid() == minded:
        pass

minded = os.fork()
if minded == 0:
    minded = os.getpid()
    os.setsid = until_the_keeper_is_gone
    landlock.restrict = lambda *_: None
    system.Filter.load = lambda _: None
    runner.run_tests = lambda _: os._exit(print(os.read(runner.CHANNEL, 1), flush=True) or 0)
    test = keeper._Process(SimpleNamespace(mode="stdin"), {"namespaces": False, "readable": [], "devices": []})
    os.write(test.channel, b"g")
    os._exit(0)
os.waitpid(minded, 0)
"""


def test_no_test_begins_whose_keeper_was_killed_as_it_started_it():
    command = [sys.executable, "-c", ORPHANED]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("", "", 0)


def test_limits_of_the_worker_itself_do_not_reach_the_slot(slot):
    """A grading process has a limit on computing time that moves; the slot outlives many."""
    import resource

    slot.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 60, hard))
    try:
        source = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU)[0])"
        assert one(slot, source).stdout == f"{hard}\n".encode()
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def test_packages_are_there_by_name_alone(tmp_path, monkeypatch):
    (tmp_path / "given_package").mkdir()
    (tmp_path / "given_package" / "__init__.py").write_text("from .part import three")
    (tmp_path / "given_package" / "part.py").write_text("three = 3")
    (tmp_path / "given_module.py").write_text("four = 4")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="'no_such_package', which is not installed"):
        open_sandbox(packages=("no_such_package",))
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = open_sandbox(packages=("given_package", "given_module"))
    try:
        source = "import given_package, given_module\nprint(given_package.three, given_module.four)\nimport numpy"
        outcome = one(sandbox, source)
    finally:
        sandbox.close()
    assert outcome.stdout == b"3 4\n"
    assert outcome.note == "ModuleNotFoundError: No module named 'numpy'"
