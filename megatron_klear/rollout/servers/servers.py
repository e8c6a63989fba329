"""Starts vLLM servers, waits until they are healthy, starts again those that die, and ends them with the run.

    servers = Servers(run_commands(rollout, served, choose_ports(0, 2), api_key=None), folder=output / "servers")
    servers.start()
    ...
    for address in servers.poll(): ...      # came back without the present weights
    servers.close()

Every server runs below a supervisor (`supervisor.py`), so that no process of it outlives this one.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TextIO

from megatron_klear.errors import UserError
from megatron_klear.rollout.servers.command import ServerCommand

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_WATCH_SECONDS = 0.3
_HEALTH_TIMEOUT_SECONDS = 5.0
_GRACE_SECONDS = 10.0  # for a server to end by itself after SIGTERM
_LONGEST_PAUSE_SECONDS = 30.0
_TAIL_LINES = 40
_MOST_NOTICES = 100
# Below the range that systems hand out to outgoing connections, which could take a port while its server restarts.
_PORTS = range(20000, 32000)


class ServersError(UserError):
    """Servers that do not start, or that die again and again."""


class _State(Enum):
    DOWN = "down"
    STARTING = "starting"
    HEALTHY = "healthy"


@dataclass(slots=True)
class _Server:
    """What is known of one server; guarded by the lock of its owner."""

    name: str
    command: ServerCommand
    log: Path
    process: subprocess.Popen[bytes] | None = None
    state: _State = _State.DOWN
    started_at: float = 0.0
    not_before: float = 0.0
    log_start: int = 0
    restarts: int = 0
    """Since its last answer."""


class Servers:
    """The vLLM servers of one run on this machine.

    One thread watches them: `poll`, `restart` and `answered` return at once and may be called from any thread.
    """

    def __init__(
        self,
        commands: Sequence[ServerCommand],
        *,
        folder: Path,
        startup_seconds: float = 600.0,
        max_restarts: int = 10,
    ) -> None:
        """`folder` takes one log a server, `server-N.log`, to which every start appends."""
        self._servers = [
            _Server(name=f"server {index}", command=command, log=folder / f"server-{index}.log")
            for index, command in enumerate(commands)
        ]
        self._startup_seconds = startup_seconds
        self._max_restarts = max_restarts
        self._lock = threading.Lock()
        self._came_back: list[str] = []
        self._notices: deque[str] = deque(maxlen=_MOST_NOTICES)
        self._failure: ServersError | None = None
        self._ending = threading.Event()
        self._watcher: threading.Thread | None = None
        self._launching = threading.Lock()  # held while a server is started again, so that `hold` sees all that start
        self._held = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """`http://host:port` of every server, the same ones after restarts."""
        return tuple(server.command.address for server in self._servers)

    @property
    def down(self) -> frozenset[str]:
        """Addresses that do not answer now, because their server is starting again."""
        with self._lock:
            return frozenset(s.command.address for s in self._servers if s.state is not _State.HEALTHY)

    @property
    def starting(self) -> bool:
        """Whether a server is on its way up."""
        with self._lock:
            return any(server.state is _State.STARTING for server in self._servers)

    @property
    def process_ids(self) -> tuple[int | None, ...]:
        """Every server's process group, which has all its processes; None while it is down."""
        with self._lock:
            return tuple(server.process.pid if server.process else None for server in self._servers)

    def start(self) -> None:
        """Start all servers at once and wait until each is healthy.

        Raises ServersError, with the end of its log, where one ends or is not healthy in time; no process is left then.
        """
        try:
            for server in self._servers:
                self._launch(server)
            while any(server.state is not _State.HEALTHY for server in self._servers):
                for server in self._servers:
                    problem = self._advance(server)
                    if problem:
                        raise ServersError(f"{server.name} ({server.command.address}) {problem}{_tail(server)}")
                time.sleep(_WATCH_SECONDS)
        except BaseException:
            self.close()
            raise
        self._came_back.clear()
        self._watcher = threading.Thread(target=self._watch, name="rollout servers", daemon=True)
        self._watcher.start()

    def poll(self) -> list[str]:
        """Addresses that came back after a restart since the last call; they hold the weights that they started with.

        Raises ServersError where a server died too often without an answer in between.
        """
        with self._lock:
            if self._failure:
                raise self._failure
            came_back, self._came_back = self._came_back, []
            return came_back

    def notices(self) -> list[str]:
        """What happened to servers since the last call, in words; of very much, the last."""
        with self._lock:
            notices = list(self._notices)
            self._notices.clear()
            return notices

    def answered(self, address: str) -> None:
        """A response came from this server: its count of restarts begins anew."""
        with self._lock:
            for server in self._servers:
                if server.command.address == address:
                    server.restarts = 0

    def restart(self, address: str) -> None:
        """Kill a server that hangs or holds wrong weights; it starts again as one that died. Others are left alone."""
        with self._lock:
            for server in self._servers:
                if server.command.address == address and server.process and server.state is not _State.DOWN:
                    _signal(server.process, signal.SIGQUIT)

    def hold(self) -> None:
        """From now on one that died stays down, until `release`: it would take memory that others gave back."""
        with self._launching:
            self._held = True

    def release(self) -> None:
        """Start again what died meanwhile."""
        self._held = False

    def close(self) -> None:
        """End all servers: SIGTERM, and SIGKILL for what is left after some seconds. May be called twice."""
        self._ending.set()
        if self._watcher and self._watcher is not threading.current_thread():
            self._watcher.join()
        running = [server for server in self._servers if server.process]
        for server in running:
            _signal(server.process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS + 5
        for server in running:
            _end(server.process, max(0.0, deadline - time.monotonic()))
            with self._lock:
                server.process, server.state = None, _State.DOWN

    def _launch(self, server: _Server) -> None:
        server.log.parent.mkdir(parents=True, exist_ok=True)
        command = server.command
        supervised = [sys.executable, "-P", "-S", str(_SUPERVISOR), str(os.getpid()), str(_GRACE_SECONDS)]
        with open(server.log, "a") as log:
            _write_header(log, command)
            server.log_start = log.tell()
            process = subprocess.Popen(
                [*supervised, *command.arguments],
                env=command.environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with self._lock:
            server.process, server.state, server.started_at = process, _State.STARTING, time.monotonic()

    def _advance(self, server: _Server) -> str:
        """Bring what is known of a running server up to date; returns what is wrong with it, and then it is down."""
        process = server.process
        if process is None:
            return ""
        code = _exit_code(process)
        if code is not None:
            problem = f"ended with exit code {code}"
        elif server.state is _State.STARTING and is_healthy(server.command):
            with self._lock:
                server.state = _State.HEALTHY
                self._came_back.append(server.command.address)
            return ""
        elif server.state is _State.STARTING and time.monotonic() - server.started_at > self._startup_seconds:
            problem = f"was not healthy within rollout.server.startup_seconds {self._startup_seconds:g}"
        else:
            return ""
        with self._lock:
            server.state = _State.DOWN  # from here on `restart` leaves the process alone
        _signal(process, signal.SIGQUIT)
        _end(process, _GRACE_SECONDS)
        with self._lock:
            server.process = None
        return problem

    def _watch(self) -> None:
        while not self._ending.wait(_WATCH_SECONDS):
            for server in self._servers:
                try:
                    self._revive(server)
                except Exception as error:
                    self._fail(f"{server.name} cannot be watched or started: {type(error).__name__}: {error}")
                    return

    def _revive(self, server: _Server) -> None:
        was_starting = server.state is _State.STARTING
        problem = self._advance(server)
        if problem:
            self._plan_restart(server, problem)
        with self._launching:
            down = server.process is None and not self._held and self._failure is None
            if down and time.monotonic() >= server.not_before:
                self._launch(server)
        if was_starting and server.state is _State.HEALTHY:
            with self._lock:
                self._notices.append(f"{server.name} ({server.command.address}) is back")

    def _plan_restart(self, server: _Server, problem: str) -> None:
        with self._lock:
            server.restarts += 1
            restarts = server.restarts
            if restarts <= self._max_restarts:
                self._notices.append(f"{server.name} ({server.command.address}) {problem}; restart {restarts}")
        if restarts > self._max_restarts:
            self._fail(
                f"{server.name} ({server.command.address}) {problem}, after rollout.server.max_restarts "
                f"{self._max_restarts} restarts without an answer in between{_tail(server)}"
            )
        pause = 0.0 if restarts == 1 else min(_LONGEST_PAUSE_SECONDS, 2.0 ** (restarts - 2))
        server.not_before = time.monotonic() + pause

    def _fail(self, message: str) -> None:
        with self._lock:
            self._failure = self._failure or ServersError(message)


def is_healthy(command: ServerCommand, timeout_seconds: float = _HEALTH_TIMEOUT_SECONDS) -> bool:
    """Whether a server answers on `/health`."""
    host, _, port = command.address.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_seconds)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def choose_ports(first: int, count: int) -> list[int]:
    """`count` ports from `first` on, or free ones where `first` is 0.

    Raises ServersError where a port asked for is taken, or none is free.
    """
    if first:
        ports = list(range(first, first + count))
        taken = [port for port in ports if not _is_free(port)]
        if taken:
            raise ServersError(
                f"port {taken[0]} of rollout.server.port is taken on this machine; end what listens on it (perhaps "
                "servers of another run), choose another port, or 0 for free ones"
            )
        return ports
    candidates = random.SystemRandom().sample(_PORTS, len(_PORTS))
    ports = [port for port, _ in zip((p for p in candidates if _is_free(p)), range(count), strict=False)]
    if len(ports) < count:
        raise ServersError(f"no {count} ports from {_PORTS.start} to {_PORTS.stop} are free for rollout servers")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: what only lingers of an ended server is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _write_header(log: TextIO, command: ServerCommand) -> None:
    log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {command.shown()}\n")
    log.flush()


def _tail(server: _Server) -> str:
    """The end of what the last start wrote to the log, as a part of a message."""
    with open(server.log, "rb") as log:
        log.seek(server.log_start)
        lines = log.read().decode(errors="replace").splitlines()
    shown = "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
    return f"; {server.log} ends with\n{shown}" if shown else f"; it wrote nothing to {server.log}"


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Exit code as a shell tells it of a supervisor that ended, whose process id is kept: its group has that name."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status


def _signal(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    """Tell a supervisor that has not been reaped. `Popen.send_signal` would reap one that ended."""
    if process is not None:
        os.kill(process.pid, number)


def _end(process: subprocess.Popen[bytes] | None, seconds: float) -> None:
    """Wait for a supervisor to end; then kill what its group still has."""
    if process is None:
        return
    deadline = time.monotonic() + seconds
    while _exit_code(process) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # Before the supervisor is reaped: until then nobody else can get its group's number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
