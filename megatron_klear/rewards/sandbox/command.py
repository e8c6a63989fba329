"""How the process that waits for programs is started: bubblewrap, the interpreter, a user of its own."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from megatron_klear.rewards.base import RewardError

INSIDE = Path(__file__).with_name("inside")
_OPTIONS = ("-P", "-s", "-B", "-X", "utf8")
"""As -I, but that one disregards PYTHONHASHSEED as well; the environment holds nothing else."""
_PLACE, _PACKAGES = "/sandbox/inside", "/sandbox/packages"
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")
_DEVICES = ("null", "zero", "full", "random", "urandom")
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_USER_RANGES = ((0x70000000, 1 << 27), (20_000, 40_000))
"""First and number of the users that slots take: outside all that systems hand out; in containers with few, others."""
_SLOTS_PER_PROCESS = 32
_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH
_COUNTER = itertools.count()


def interpreter() -> Path:
    """The Python that programs run on: the one that this environment was made from."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def own_user() -> int:
    """A user for one slot that no other has; 0 where this process may not become another."""
    if os.geteuid() != 0:
        return 0
    number = os.getpid() * _SLOTS_PER_PROCESS + next(_COUNTER) % _SLOTS_PER_PROCESS
    for first, count in _USER_RANGES:
        if all(_is_mapped(first, count, Path(f"/proc/self/{kind}_map")) for kind in ("uid", "gid")):
            return first + number % count
    return 0


def _is_mapped(first: int, count: int, path: Path) -> bool:
    rows = (map(int, line.split()) for line in path.read_text().splitlines())
    return any(start <= first and first + count <= start + size for start, _, size in rows)


def package_places(names: Sequence[str]) -> list[Path]:
    """Folders or files of packages that programs may import. Raises RewardError where one is not installed here."""
    places = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise RewardError(f"programs are to have the package {name!r}, which is not installed here; install it")
        origin = Path(spec.origin).resolve()
        places.append(origin.parent if spec.submodule_search_locations else origin)
    return places


def landlock_command(control: int, user: int, packages: Sequence[Path] = ()) -> list[str]:
    """The command that starts a zygote outside all namespaces, with a control socket on that descriptor.

    Raises RewardError where the user that it becomes cannot be let into the interpreter's folder.
    """
    needed = {parent for path in (interpreter(), INSIDE, *packages) for parent in (path, *path.parents)}
    closed = sorted(str(path) for path in needed if path.is_dir() and not path.stat().st_mode & 0o001)
    if user and closed and not _may_read_all():
        raise RewardError(
            f"programs run as another user, who may not enter {closed[0]}, and this root lacks CAP_DAC_READ_SEARCH to "
            "let them; take a Python outside of it, or let others enter it"
        )
    command = _python_command(INSIDE, control, user, namespaces=False, read_all=bool(user and closed))
    return [*command, *map(str, packages)]


def _may_read_all() -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapPrm:")[2].split()[0], 16) & _READ_ALL)


def landlock_paths(packages: Sequence[Path] = ()) -> dict[str, list[str]]:
    """What programs may read there, and to which files they may write."""
    readable = [*_SYSTEM, "/usr/share/zoneinfo", "/etc/ld.so.cache", str(_python_library()), *map(str, packages)]
    return {"readable": readable, "devices": [f"/dev/{name}" for name in _DEVICES]}


def _python_command(place: Path | str, control: int, user: int, *, namespaces: bool, read_all: bool) -> list[str]:
    """The zygote's own command, with its files at `place`."""
    told = [control, user, int(namespaces), int(read_all)]
    return [str(interpreter()), *_OPTIONS, str(place), *map(str, told)]


def _python_library() -> Path:
    return Path(sys.base_prefix).resolve() / "lib"


def bubblewrap_command(control: int, user: int, packages: Sequence[Path] = ()) -> list[str]:
    """The command that starts a zygote in namespaces of its own, with a control socket on that descriptor.

    It sees the system's libraries and the interpreter's, read-only; no home, no /sys, no network, and of /etc the
    loader's cache alone. Raises RewardError where bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise RewardError(
            "programs run in bubblewrap, and there is no `bwrap` on PATH; install it (Debian and Ubuntu: `apt-get "
            "install bubblewrap`)"
        )
    if interpreter().is_relative_to("/tmp") or interpreter().is_relative_to("/dev"):
        raise RewardError(
            f"the interpreter {interpreter()} lies in a folder that programs get empty; move it elsewhere"
        )
    command = [program, "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += [*_system(), *_python(), *_devices(), "--tmpfs", "/tmp", "--dir", "/proc"]
    if not user:
        command += ["--unshare-user", "--proc", "/proc"]
        if os.geteuid() == 0:
            command += ["--uid", "65534", "--gid", "65534"]
    command += ["--perms", "0755", "--dir", str(Path(_PLACE).parent), "--ro-bind", str(INSIDE), _PLACE]
    inside = [f"{_PACKAGES}/{place.name}" for place in packages]
    command += ["--perms", "0755", "--dir", _PACKAGES]
    for place, bound in zip(packages, inside, strict=True):
        command += ["--ro-bind", str(place), bound]
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*command, *_python_command(_PLACE, control, user, namespaces=True, read_all=False), *inside]


def _system() -> list[str]:
    command = []
    for parent in ("/usr", "/usr/share", "/etc"):
        command += ["--perms", "0755", "--dir", parent]  # bubblewrap makes parents that lack for its own user alone
    for directory in map(Path, _SYSTEM):
        if directory.is_symlink():
            command += ["--symlink", str(directory.readlink()), str(directory)]
        elif directory.is_dir():
            command += ["--ro-bind", str(directory), str(directory)]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    return [*command, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]


def _python() -> list[str]:
    """The interpreter and its library, without packages that were installed into it."""
    executable, library = interpreter(), _python_library()
    places = [executable] + [library] * (not library.is_relative_to("/usr/lib"))
    command = []
    for place in places:
        for parent in reversed(place.parents[:-1]):
            if not parent.is_relative_to("/usr/lib"):
                command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(place), str(place)]
    for name in ("site-packages", "dist-packages"):
        packages = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix})).resolve() / name
        if packages.is_dir():
            command += ["--perms", "0755", "--tmpfs", str(packages), "--remount-ro", str(packages)]
    return command


def _devices() -> list[str]:
    command = ["--perms", "0755", "--tmpfs", "/dev"]
    for name in _DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in (("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")):
        command += ["--symlink", f"/proc/{target}", f"/dev/{name}"]
    return [*command, "--perms", "0755", "--dir", "/dev/shm"]
