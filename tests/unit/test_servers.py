"""Servers start together, come back when they die, and leave nothing behind, however the run ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_klear.cli.serve_rollouts import serve
from megatron_klear.rollout.servers import servers as servers_module
from megatron_klear.rollout.servers.command import ServerCommand
from megatron_klear.rollout.servers.servers import Servers, ServersError, choose_ports

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "fake_server.py"


def exists(pid: int) -> bool:
    """Whether a process lives, a zombie not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


class Machine:
    """Fake servers in a folder, and what they left in the system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: list[Servers] = []

    def command(self, index: int, do: str, port: int) -> ServerCommand:
        return ServerCommand(
            arguments=(sys.executable, str(FAKE), "--port", str(port)),
            variables={"FAKE_SERVER_DO": do, "FAKE_SERVER_PIDS": str(self.folder / f"pids-{index}")},
            dropped=(),
            host="127.0.0.1",
            port=port,
        )

    def servers(self, *do: str, startup_seconds: float = 20.0, max_restarts: int = 10) -> Servers:
        commands = [self.command(i, d, p) for i, (d, p) in enumerate(zip(do, choose_ports(0, len(do)), strict=True))]
        made = Servers(commands, folder=self.folder, startup_seconds=startup_seconds, max_restarts=max_restarts)
        self.open.append(made)
        return made

    def starts(self, index: int = 0) -> list[tuple[int, int, str]]:
        """Of every start so far: the server's and its worker's process ids, and its shared memory."""
        notes = sorted(
            (self.folder / f"pids-{index}").glob("[0-9]*"), key=lambda path: int(path.name.partition("-")[0])
        )
        fields = [note.read_text().split() for note in notes]
        return [(int(server), int(worker), memory) for server, worker, memory in fields]

    def left_behind(self) -> list[object]:
        notes = [start for folder in self.folder.glob("pids-*") for start in self.starts(int(folder.name[5:]))]
        memories = [Path("/dev/shm") / memory for _, _, memory in notes]
        return [pid for note in notes for pid in note[:2] if exists(pid)] + [m for m in memories if m.exists()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(servers_module, "_GRACE_SECONDS", 1.0)
    made = Machine(tmp_path)
    yield made
    for servers in made.open:
        servers.close()
    wait_until(lambda: not made.left_behind())


def test_servers_are_healthy_when_start_returns_and_gone_after_close(machine: Machine):
    servers = machine.servers("serve", "serve")
    servers.start()
    assert len(set(servers.addresses)) == 2
    assert servers.down == frozenset()
    assert servers.poll() == []
    assert all(exists(pid) for i in (0, 1) for pid in machine.starts(i)[0][:2])
    servers.close()
    assert machine.left_behind() == []
    servers.close()


@pytest.mark.parametrize("victim", ["server", "supervisor"])
def test_a_killed_server_comes_back_at_its_address(machine: Machine, victim: str):
    servers = machine.servers("serve", "serve")
    servers.start()
    (server, worker, memory), supervisor = machine.starts()[0], servers.process_ids[0]
    os.kill(server if victim == "server" else supervisor, signal.SIGKILL)
    wait_until(lambda: servers.addresses[0] in servers.down)
    came_back: list[str] = []
    wait_until(lambda: came_back.extend(servers.poll()) or came_back)
    assert came_back == [servers.addresses[0]]
    assert servers.poll() == []
    assert len(machine.starts(0)) == 2
    assert len(machine.starts(1)) == 1
    assert not exists(server)
    if victim == "server":
        assert not exists(worker)
        assert not (Path("/dev/shm") / memory).exists()
    else:  # a worker in a session of its own is beyond the reach of its group
        os.kill(worker, signal.SIGKILL)
        (Path("/dev/shm") / memory).unlink(missing_ok=True)
    assert [notice.split(") ")[1] for notice in servers.notices()] == ["ended with exit code 137; restart 1", "is back"]


def test_a_held_server_that_dies_stays_down_until_released(machine: Machine):
    servers = machine.servers("serve", "serve")
    servers.start()
    assert not servers.starting
    servers.hold()
    os.kill(machine.starts()[0][0], signal.SIGKILL)
    wait_until(lambda: servers.process_ids[0] is None)
    time.sleep(4 * servers_module._WATCH_SECONDS)
    assert len(machine.starts(0)) == 1
    assert servers.down == {servers.addresses[0]}
    servers.release()
    wait_until(lambda: servers.poll() == [servers.addresses[0]])
    assert len(machine.starts(0)) == 2


def test_a_hung_server_can_be_restarted(machine: Machine):
    servers = machine.servers("serve")
    servers.start()
    os.kill(machine.starts()[0][0], signal.SIGSTOP)
    servers.restart(servers.addresses[0])
    came_back: list[str] = []
    wait_until(lambda: came_back.extend(servers.poll()) or came_back)
    assert not exists(machine.starts()[0][0])
    assert servers_module.is_healthy(machine.command(0, "serve", int(servers.addresses[0].rpartition(":")[2])))


def test_one_that_ends_at_the_start_is_told_with_its_log(machine: Machine):
    servers = machine.servers("serve", "die")
    with pytest.raises(ServersError, match=r"server 1 .* ended with exit code 3; .*server-1.log ends with") as raised:
        servers.start()
    assert "RuntimeError: not enough memory for the cache" in str(raised.value)
    assert machine.left_behind() == []


def test_one_that_never_is_healthy_is_told(machine: Machine):
    with pytest.raises(ServersError, match=r"server 0 .*startup_seconds 1; .*server-0.log"):
        machine.servers("deaf", startup_seconds=1.0).start()
    assert machine.left_behind() == []


def test_restarts_without_an_answer_are_counted(machine: Machine):
    servers = machine.servers("die_later", max_restarts=2)
    servers.start()
    os.kill(machine.starts()[0][0], signal.SIGKILL)

    def failed() -> str:
        try:
            servers.poll()
        except ServersError as error:
            return str(error)
        return ""

    wait_until(failed)
    assert "max_restarts 2" in failed()
    assert "not enough memory" in failed()
    assert len(machine.starts()) == 3


def test_an_answer_starts_the_count_anew(machine: Machine):
    servers = machine.servers("serve", max_restarts=1)
    servers.start()
    for kill in range(3):
        os.kill(machine.starts()[-1][0], signal.SIGKILL)
        wait_until(lambda: servers.poll())
        assert len(machine.starts()) == kill + 2
        servers.answered(servers.addresses[0])


PARENT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_servers import Machine
servers = Machine(Path({folder!r})).servers("serve", "serve")
servers.start()
print("started", flush=True)
__import__("time").sleep(600)
"""


def test_nothing_outlives_a_killed_run(tmp_path: Path):
    path = [str(ROOT), str(ROOT / "tests" / "unit")]
    program = PARENT.format(path=path, folder=str(tmp_path))
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout
    assert run.stdout.readline() == "started\n"
    machine = Machine(tmp_path)
    assert len(machine.left_behind()) == 6
    run.kill()
    run.wait()
    wait_until(lambda: not machine.left_behind())


class Signalled(Servers):
    """None, whose process is told to end as they start."""

    closed = False

    def start(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def poll(self) -> list[str]:
        pytest.fail("they go on")

    def close(self) -> None:
        self.closed = True


def test_a_second_signal_does_not_break_off_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    servers, install, to_come = Signalled([], folder=tmp_path), signal.signal, [signal.SIGINT]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def signalled_again(number: int, handler: object) -> None:
        install(number, handler)
        if handler is signal.SIG_IGN and to_come:
            os.kill(os.getpid(), to_come.pop())

    monkeypatch.setattr(signal, "signal", signalled_again)
    try:
        serve(servers, [])
    except KeyboardInterrupt:
        pytest.fail("the second one was not ignored")
    finally:
        for number, handler in before.items():
            install(number, handler)
    assert servers.closed


def test_ports_that_are_taken_are_told():
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ServersError, match=f"port {port} of rollout.server.port is taken"):
            choose_ports(port, 1)
    ports = choose_ports(0, 50)
    assert len(set(ports)) == 50
