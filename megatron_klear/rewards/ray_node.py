"""A Ray of the run's own: started, and ended with the run however that ends.

    with RayNode.start(cpus=8) as head: ...                    # the first node of a run
    with RayNode.start(cpus=8, address=head.address): ...      # another node joins it

Ray's own processes do not all end when the process that started them is killed, so they run below a supervisor, which
kills whatever is left. No dashboard, no usage statistics, no log monitor; its logs lie in a folder that goes with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from .base import RewardError
from .process import ENVIRONMENT, import_paths

# A program of the standard library alone, started and never imported.
_SUPERVISOR = Path(__file__).resolve().parents[1] / "rollout" / "servers" / "supervisor.py"
_RAY = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
START_SECONDS = 180.0  # a dozen processes on a busy machine
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_STORE_BYTES = 80_000_000  # Ray's least; what it holds is the responses under way
_PREFIX, _LOCK, _LOG = "klear-ray-", "in-use", "ray.log"
_LONGEST_TEMPORARY = 40  # bytes of a folder: Ray makes sockets below, whose paths are cut at 107
_JUST_MADE_SECONDS = 60.0
_TAIL_LINES = 20
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Ray would kill graders for memory that others on the node take; a grader has a limit of its own.
    "RAY_memory_monitor_refresh_ms": "0",
}


def check_ray() -> None:
    """Raise RewardError where Ray is not installed; imports it not."""
    if find_spec("ray") is None:
        raise RewardError(
            'reward.backend = "ray" needs Ray, which is not installed: pip install "megatron-klear[ray]", or set '
            'reward.backend = "local"'
        )


def secure() -> None:
    """Have this process start and reach the run's own Ray with a secret, made once and kept in its environment.

    Nodes that join need the same in RAY_AUTH_TOKEN. Grading processes do not get it.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    if not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@dataclass(frozen=True, slots=True)
class Head:
    """What another node needs to join: host:port, and the secret."""

    address: str
    token: str = field(repr=False)


class RayNode:
    """Ray's processes on this node; a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, lock: int, address: str) -> None:
        self._process, self._folder, self._lock, self.address = process, folder, lock, address

    @classmethod
    def start(cls, cpus: int, *, address: str = "", wanted: Callable[[], bool] = lambda: True) -> RayNode:
        """Start a Ray of `cpus` graders, or join with as many the one at `address` (host:port); returns once it is up.

        Raises RewardError with the end of Ray's log where it does not come up, or is not `wanted` any more.
        """
        check_ray()
        secure()
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_temporary()))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / _LOG, "wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-S", str(_SUPERVISOR), str(os.getpid()), str(_GRACE_SECONDS)),
                    *(sys.executable, "-P", "-c", _RAY, "start", *_options(cpus, address, folder)),
                ],
                env=_environment(os.environ),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = cls(process, folder, lock, address)
        try:
            node._wait(wanted)
        except BaseException:
            node.close()
            raise
        return node

    def __enter__(self) -> RayNode:
        """The node itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End Ray on this node."""
        self.close()

    @property
    def supervisor(self) -> int:
        """Process id of what all of Ray runs below."""
        return self._process.pid

    def check(self) -> None:
        """Raise RewardError where Ray has ended by itself."""
        code = self._process.poll()
        if code is not None:
            raise RewardError(f"the run's own Ray ended with exit code {code}{self._tail()}")

    def close(self) -> None:
        """End all of Ray's processes here, and remove its folder. Closing twice is harmless."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _wait(self, wanted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            self.check()
            if not wanted():
                raise RewardError("the run's own Ray was ended while it started")
            if time.monotonic() > deadline:
                raise RewardError(f"the run's own Ray was not up within {START_SECONDS:g} s{self._tail()}")
            time.sleep(_POLL_SECONDS)

    def _is_up(self) -> bool:
        if not self.address:
            with contextlib.suppress(OSError):  # not written yet
                self.address = (self._folder / "ray_current_cluster").read_text().strip()
        with contextlib.suppress(OSError):
            return bool(self.address) and b"Ray runtime started" in (self._folder / _LOG).read_bytes()
        return False

    def _tail(self) -> str:
        try:
            lines = (self._folder / _LOG).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            return ""
        return "; it said last\n" + "\n".join(f"    {line}" for line in lines) if lines else "; it said nothing"


def _options(cpus: int, address: str, folder: Path) -> list[str]:
    own = ["--block", f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={_STORE_BYTES}"]
    own += ["--disable-usage-stats", "--include-log-monitor=false", "--log-color=false"]
    if address:
        return [*own, f"--address={address}"]
    own += ["--head", "--port=0", "--include-dashboard=false", "--no-monitor", f"--temp-dir={folder}"]
    if find_spec("grpc") is not None:  # then Ray opens one more port, the same for every Ray of a machine
        own.append(f"--ray-client-server-port={_free_port()}")
    return own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """What grading processes get, and Ray's own settings: its processes hold no key of the run either."""
    kept = {name: value for name, value in given.items() if name in ENVIRONMENT or name.startswith("RAY_")}
    kept.pop("RAY_ADDRESS", None)  # of another Ray
    return {**_SETTINGS, **kept, "PYTHONPATH": os.pathsep.join(import_paths()), "OMP_NUM_THREADS": "1"}


def _temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _LONGEST_TEMPORARY else "/tmp"


def _sweep() -> None:
    """Remove the folders of runs that were killed; those of living runs are locked."""
    for folder in Path(_temporary()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where the folder is in use, just made, or another user's."""
    if time.time() - folder.stat().st_mtime < _JUST_MADE_SECONDS:
        raise BlockingIOError
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
