"""A sandbox behind HTTP, against a stand-in for SandboxFusion that runs Python for real."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.sandbox import Limits, Program
from megatron_klear.rewards.sandbox.remote import RemoteSandbox
from tests.hostile_runs import HONEST, INPUTS, right


class StandIn(BaseHTTPRequestHandler):
    """`/run_code` as SandboxFusion answers it; other paths misbehave by their name."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        fault = self.path.split("/")[1]
        if fault == "late":
            self.server.over.wait(20)
            return
        if fault == "busy" and len(self.server.asked) < 3:
            return self.answer(503, b"too busy")
        if fault == "refused":
            return self.answer(422, b'{"detail": "no such language"}')
        if fault in ("text", "other"):
            return self.answer(200, b"<html>" if fault == "text" else b'{"result": 1}')
        if fault == "broken":
            return self.answer(200, json.dumps({"status": "SandboxError", "message": "no container"}).encode())
        self.answer(200, json.dumps(self.run(asked)).encode())

    def run(self, asked):
        command = [sys.executable, "-I", "-c", asked["code"]]
        given = {"input": asked["stdin"], "timeout": asked["run_timeout"], "text": True, "capture_output": True}
        try:
            ran = subprocess.run(command, **given)
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "message": "", "run_result": {"status": "TimeLimitExceeded"}}
        result = {"status": "Finished", "execution_time": 0.02, "return_code": ran.returncode}
        result |= {"stdout": ran.stdout, "stderr": ran.stderr}
        return {"status": "Failed" if ran.returncode else "Success", "message": "", "run_result": result}

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    found.asked, found.over = [], threading.Event()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def at(server):
    """A sandbox at a path of the stand-in."""

    def connect(path="", **settings):
        return RemoteSandbox(f"http://127.0.0.1:{server.server_port}{path}", retry_seconds=0, **settings)

    return connect


def test_programs_run_there(at, server):
    sandbox = at()
    outcomes = sandbox.run(HONEST, INPUTS, limits=Limits(wall_seconds=20, memory_bytes=3 << 20))
    assert all(right(index, outcome) for index, outcome in enumerate(outcomes))
    assert outcomes[0].cpu_seconds == 0.02
    asked = {"code": HONEST.source, "language": "python", "stdin": "1 2\n", "run_timeout": 20, "memory_limit_MB": 3}
    assert server.asked[0] == asked
    sandbox.close()


@pytest.mark.parametrize(
    ("source", "status", "note"),
    [
        ("1 / 0", "crashed", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "crashed", "exit 3"),
        ("raise MemoryError", "memory", "MemoryError"),
        ("import time\ntime.sleep(9)", "timeout", "the service's time limit"),
        ("#" * 300, "compile", "more than 200 bytes of source"),
    ],
)
def test_endings(at, source, status, note):
    (outcome,) = at().run(Program(source=source), [b""], limits=Limits(wall_seconds=0.5, source_bytes=200))
    assert (outcome.status, outcome.note) == (status, note)


def test_early_stop(at, server):
    outcomes = at().run(HONEST, INPUTS * 2, enough=lambda index, outcome: index == 0)
    assert [o.status for o in outcomes] == ["done", "skipped", "skipped", "skipped"]
    assert len(server.asked) == 1


def test_a_busy_service_is_asked_again(at, server):
    assert right(0, at("/busy").run(HONEST, INPUTS[:1])[0])
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/refused", "HTTP status 422: .*no such language"),
        ("/text", "no JSON"),
        ("/other", "not of SandboxFusion's form"),
        ("/broken", "has failed: no container"),
        ("/late", "did not answer within"),
    ],
)
def test_faults_of_the_service_are_told(at, path, words):
    with pytest.raises(RewardError, match=words):
        at(path, grace_seconds=0.1).run(HONEST, INPUTS, limits=Limits(wall_seconds=0.1))


def test_a_service_that_is_not_there_is_told(at, server):
    sandbox = at()
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match="cannot be asked"):
        sandbox.run(HONEST, INPUTS)


def test_what_it_cannot_do_is_refused_in_words(at):
    for program in (Program(source="", mode="call", entry="f"), Program(source="", prelude="import math")):
        with pytest.raises(RewardError, match="standard input alone"):
            at().run(program, [b""])
    with pytest.raises(RewardError, match="no trusted tests"):
        at().run_check(HONEST, "assert True")
    with pytest.raises(RewardError, match="no http"):
        RemoteSandbox("localhost:8080")
