"""The filters of system calls, executed instruction by instruction for both architectures."""

import struct

import pytest

from megatron_klear.rewards.sandbox.inside import seccomp
from megatron_klear.rewards.sandbox.inside.seccomp import ALLOW, KILL, MISSING, NO_TERMINAL, REFUSE

MACHINES = ("x86_64", "aarch64")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(instructions: bytes, machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the kernel would do with a system call: the classic BPF of linux/filter.h on struct seccomp_data."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, audit or AUDIT[machine], 0, *words)
    loaded, at, steps = 0, 0, 0
    program = list(struct.iter_unpack("<HBBI", instructions))
    while True:
        code, if_true, if_false, value = program[at]
        at, steps = at + 1, steps + 1
        assert steps <= len(program), "a jump backwards"
        if code == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
            at += if_true if holds else if_false


def all_numbers(machine):
    tables = (seccomp._ALLOWED, seccomp._KILLED, seccomp._REFUSED, seccomp._CHECKED)
    return [seccomp.numbers(table, machine) for table in tables]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_gets_what_its_table_says(machine):
    allowed, killed, refused, checked = all_numbers(machine)
    assert len({*allowed, *killed, *refused, *checked}) == sum(map(len, (allowed, killed, refused, checked)))
    expected = dict.fromkeys(allowed.values(), ALLOW) | dict.fromkeys(killed.values(), KILL)
    expected |= dict.fromkeys(refused.values(), REFUSE)
    program = seccomp.program_filter(machine)
    assert len(program) // 8 <= 4096
    for number in set(range(1000)) - set(checked.values()):
        assert verdict(program, machine, number) == expected.get(number, MISSING), number


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_another_architecture_kill(machine):
    program = seccomp.program_filter(machine)
    assert verdict(program, machine, 1, audit=0x40000003) == KILL
    assert verdict(program, machine, 0x40000000 + 1) == KILL
    assert verdict(program, machine, 0xFFFFFFFF) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_with_looked_at_arguments(machine):
    program = seccomp.program_filter(machine)
    names = ("ioctl", "fcntl", "prlimit64", "prctl")
    ioctl, fcntl, prlimit, prctl = (seccomp.number(name, machine) for name in names)
    assert verdict(program, machine, prctl, 4, 1) == REFUSE
    assert verdict(program, machine, prctl, 15) == ALLOW
    assert verdict(program, machine, ioctl, 0, 0x5401) == ALLOW
    assert verdict(program, machine, ioctl, 0, 0x5412) == NO_TERMINAL
    assert verdict(program, machine, fcntl, 0, 3) == ALLOW
    for refused in (8, 10, 15, 1024, 1033, 1 << 32 | 8):
        assert verdict(program, machine, fcntl, 0, refused) == REFUSE
    assert verdict(program, machine, prlimit, 0, 7) == ALLOW
    assert verdict(program, machine, prlimit, 1, 7) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_threads_but_no_processes(machine):
    clone, write = seccomp.number("clone", machine), seccomp.number("write", machine)
    program = seccomp.no_new_processes(machine)
    assert verdict(program, machine, clone, 0x3D0F00) == ALLOW
    assert verdict(program, machine, clone, 17) == KILL
    assert verdict(program, machine, write, 17) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_without_namespaces_a_process_signals_itself_alone(machine):
    program = seccomp.no_foreign_signals(machine, 4321)
    for name in ("kill", "tgkill"):
        number = seccomp.number(name, machine)
        assert verdict(program, machine, number, 4321, 9) == ALLOW
        for other in (0, 1, 4320, 0xFFFFFFFF):
            assert verdict(program, machine, number, other, 9) == REFUSE
    assert verdict(program, machine, seccomp.number("tkill", machine), 4321, 9) == REFUSE
    prctl = seccomp.number("prctl", machine)
    assert verdict(program, machine, prctl, 1, 0) == REFUSE
    assert verdict(program, machine, prctl, 15, 0) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_without_namespaces_nothing_changes_a_file_that_is_not_open(machine):
    program = seccomp.program_filter(machine, namespaces=False)
    for name in ("truncate", "fchmod", "fchmodat", "utimensat"):
        if name in seccomp.numbers(seccomp._ALLOWED, machine):
            assert verdict(program, machine, seccomp.number(name, machine)) == REFUSE
    assert verdict(program, machine, seccomp.number("landlock_restrict_self", machine)) == ALLOW
    assert verdict(program, machine, seccomp.number("mount", machine)) == KILL


@pytest.mark.parametrize(
    ("name", "x86_64", "aarch64"),
    # uapi/asm/unistd_64.h and asm-generic/unistd.h of Linux
    [
        *(("read", 0, 63), ("openat", 257, 56), ("clone", 56, 220), ("execve", 59, 221), ("socket", 41, 198)),
        *(
            ("mount", 165, 40),
            ("ptrace", 101, 117),
            ("bpf", 321, 280),
            ("futex", 202, 98),
            ("io_uring_setup", 425, 425),
        ),
    ],
)
def test_numbers_are_the_kernels(name, x86_64, aarch64):
    assert (seccomp.number(name, "x86_64"), seccomp.number(name, "aarch64")) == (x86_64, aarch64)
