"""Programs run by a service with SandboxFusion's interface: here a stand-in that starts plain Python."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_klear.config.rl import CodeRewardConfig
from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.code.forms import read_problem
from megatron_klear.rewards.code.judge import judge
from megatron_klear.rewards.code.remote import PrintedValues
from megatron_klear.rewards.sandbox.outcome import Limits
from megatron_klear.rewards.sandbox.remote import RemoteSandbox

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=2.0, total_seconds=20.0)


class Service(ThreadingHTTPServer):
    """What it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        content = json.dumps(run(asked)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def run(asked: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-I", "-c", asked["code"]]
    try:
        done = subprocess.run(
            command, input=asked["stdin"], text=True, capture_output=True, timeout=asked["run_timeout"]
        )
    except subprocess.TimeoutExpired:
        return {"status": "Failed", "message": "", "run_result": {"status": "TimeLimitExceeded", "stdout": ""}}
    result = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": result}


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def sandbox(service: Service) -> PrintedValues:
    return PrintedValues(RemoteSandbox(f"http://127.0.0.1:{service.server_port}"))


SQUARES = {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]}
CALLS = {"inputs": [[[1, 2], "a"]], "outputs": [[2, "a"]], "fn_name": "f"}
CHECK = {"functional": "def check(candidate):\n    assert candidate(x = 2) == {3: (1.5,)}\ncheck(Solution().f)"}
PROGRAMS: dict[str, tuple[str, Any, str]] = {
    "prints": ("if __name__ == '__main__':\n    print(int(input()) ** 2)", SQUARES, "passed"),
    "prints something else": ("print(4)", SQUARES, "failed"),
    "returns": ("def f(x, y):\n    print('hm')\n    return len(x), y", CALLS, "passed"),
    "returns something else": ("def f(x, y):\n    return y", CALLS, "failed"),
    "prints what it should return": ("def f(x, y):\n    print([2, 'a'])", CALLS, "failed"),
    "is asserted": (
        "class Solution:\n    def f(self, x: int) -> dict:\n        return {x + 1: (sqrt(2.25),)}", CHECK, "passed"
    ),
    "equal to everything": (
        "class Solution:\n    def f(self, x):\n        return type('A', (), {'__eq__': 1})()", CHECK, "failed"
    ),
    "crashes": ("print(1 / 0)", SQUARES, "crashed"),
    "exits": ("print(4)\nexit(1)", SQUARES, "crashed"),
    "memory": ("raise MemoryError", SQUARES, "memory"),
    "is no Python": ("print(", SQUARES, "crashed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_verdicts(name: str, service: Service) -> None:
    program, truth, status = PROGRAMS[name]
    result = judge(program, read_problem(truth), sandbox(service), limits=LIMITS)
    assert result.status == status, result.note


def test_an_early_stop_and_a_time_limit(service: Service) -> None:
    problem = read_problem(SQUARES)
    short = Limits(cpu_seconds=0.5, wall_seconds=0.5, total_seconds=10.0)
    result = judge("while True:\n    pass", problem, sandbox(service), limits=short, first_failure_decides=True)
    assert (result.status, result.passed, result.total, len(service.asked)) == ("timeout", 0, 2, 1)
    assert service.asked[0]["memory_limit_MB"] == 1024
    assert service.asked[0]["run_timeout"] == 0.5


def test_no_expected_value_is_sent(service: Service) -> None:
    problem = read_problem({"functional": "def check(candidate):\n    assert candidate(2) == 987654321\ncheck(f)"})
    judge("def f(x):\n    return x", problem, sandbox(service), limits=LIMITS)
    assert "987654321" not in json.dumps(service.asked)


def test_tests_that_cannot_be_split_are_refused(service: Service) -> None:
    problem = read_problem("for x in [1]:\n    assert f(x) == x")
    with pytest.raises(RewardError, match="loops, random inputs"):
        judge("def f(x):\n    return x", problem, sandbox(service), limits=LIMITS)


def test_the_address_goes_with_the_kind() -> None:
    assert CodeRewardConfig(sandbox="remote", url="http://host:1").url
    for told in ({"sandbox": "remote"}, {"url": "http://host:1"}, {"sandbox": "remote", "url": "host:1"}):
        with pytest.raises(ValueError, match=r"reward\.code\.url"):
            CodeRewardConfig(**told)  # type: ignore[arg-type]
