"""Hostile programs: none is rewarded, none ends the sandbox, none leaves anything or changes what the next one gets.

KLEAR_HOSTILE_SAMPLES=1000 runs that many in a row through one slot besides.
"""

import itertools
import os

import pytest

from megatron_klear.rewards.sandbox import Limits
from tests.hostile_programs import CHEATING, GROUPS, HOSTILE
from tests.hostile_runs import TIGHT, run_hostile
from tests.sandboxes import as_another_user, needs_bubblewrap, needs_landlock, needs_root, told

SAMPLES = int(os.environ.get("KLEAR_HOSTILE_SAMPLES", "0"))
WITHOUT_FILES = ("processes", "disk", "signals", "network", "reading", "kernel", "cheating")


def nothing_gained(report, names):
    assert report["status"].keys() == set(names)
    assert report["rewarded"] == []
    assert report["honest_failed"] == []
    assert report["starts"] == 1
    assert report["new_descriptors"] == report["new_processes"] == 0
    assert report["files"] == report["processes_after_close"] == []


def ended_as_expected(report):
    unexpected = {
        name: (status, report["note"][name])
        for name, status in report["status"].items()
        if status not in {*HOSTILE[name][0].split(), "timeout"}
    }
    assert unexpected == {}


def test_there_are_enough_kinds_of_them():
    assert len(HOSTILE) == sum(map(len, GROUPS.values())) >= 90
    assert len({source for _, source in HOSTILE.values()}) == len(HOSTILE)


@needs_bubblewrap
@pytest.mark.parametrize("group", GROUPS)
def test_nothing_is_gained_in_bubblewrap(group):
    report = run_hostile("bubblewrap", tuple(GROUPS[group]))
    nothing_gained(report, GROUPS[group])
    ended_as_expected(report)


@needs_bubblewrap
@needs_root
def test_nothing_is_gained_where_the_grader_is_not_root():
    report = told(as_another_user("/mnt/code/tests/hostile_runs.py", "bubblewrap"))
    nothing_gained(report, HOSTILE)
    ended_as_expected(report)


@needs_landlock
@pytest.mark.parametrize("group", WITHOUT_FILES)
def test_nothing_is_gained_under_landlock(group):
    report = run_hostile("landlock", tuple(GROUPS[group]))
    nothing_gained(report, GROUPS[group])
    ended_as_expected(report)


@needs_landlock
@needs_root
def test_nothing_is_gained_under_landlock_where_the_grader_is_not_root():
    names = tuple(name for group in ("signals", "reading", "kernel") for name in GROUPS[group])
    report = told(as_another_user("/mnt/code/tests/hostile_runs.py", "landlock", *names))
    nothing_gained(report, names)
    ended_as_expected(report)


@needs_bubblewrap
@pytest.mark.skipif(not SAMPLES, reason="KLEAR_HOSTILE_SAMPLES says how many")
def test_many_in_a_row():
    names = tuple(itertools.islice(itertools.cycle([*HOSTILE, *CHEATING]), SAMPLES))
    report = run_hostile("bubblewrap", names, Limits(cpu_seconds=TIGHT.cpu_seconds, wall_seconds=TIGHT.wall_seconds))
    nothing_gained(report, set(names))
