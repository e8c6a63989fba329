"""Programs run by a service that speaks SandboxFusion's `run_code`; the judging stays here."""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..base import RewardError
from ..sandbox.inside import values
from ..sandbox.outcome import Limits, Outcome, Program, Verdict

_TRIES = 3
_WAIT_SECONDS = 0.5  # before the second try, twice as much before the third
_OVERHEAD_SECONDS = 10.0
_MIB = 1 << 20
_HARNESS = """\
import builtins, json, sys, types
told = json.loads({told!r})
sys.setrecursionlimit(told["recursion"])
sys.set_int_max_str_digits(0)
main = types.ModuleType("__main__" if told["mode"] == "stdin" else "solution")
main.__dict__["__builtins__"] = builtins
sys.modules[main.__name__] = main
exec(told["prelude"], main.__dict__)
exec(compile(told["source"], "main.py", "exec", dont_inherit=True), main.__dict__)
if told["mode"] != "stdin":
    values = types.ModuleType("values")
    sys.modules["values"] = values
    exec(told["values"], values.__dict__)
    if told["mode"] == "call":
        owner = getattr(main, "Solution", None)
        function = getattr(owner(), told["entry"]) if hasattr(owner, told["entry"]) else getattr(main, told["entry"])
        result = function(*values.decode(sys.stdin.buffer.read()))
    else:
        asked = json.load(sys.stdin)
        exec(asked["setup"], main.__dict__)
        result = eval(asked["expression"], main.__dict__)
    sys.__stdout__.write(told["mark"] + values.encode(result).decode())
"""


class RemoteSandbox:
    """A Sandbox behind an address. Each test is a program of its own there; times are by the clock.

    A returned value follows a random mark in what is printed: whoever prints another value has only answered
    otherwise. Trusted tests beside a program need a sandbox here.
    """

    def __init__(self, url: str, *, wait: Callable[[float], None] = time.sleep) -> None:
        """`url` is the whole address, `http://host:port/run_code`."""
        self._url, self._wait = url, wait
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        *,
        limits: Limits | None = None,
        passed: Verdict | None = None,
        enough: Verdict | None = None,
    ) -> list[Outcome]:
        """As `Sandbox.run` says. Raises RewardError where the service does not answer, or answers something else."""
        limits = limits or Limits()
        deadline = time.monotonic() + limits.total_seconds
        outcomes: list[Outcome] = []
        for number, given in enumerate(inputs):
            left = deadline - time.monotonic()
            if left <= 0:
                outcomes.append(Outcome(status="timeout", note="the time of all tests of the program was up"))
                break
            outcomes.append(self._run_one(program, given, limits, min(left, limits.wall_seconds)))
            if enough is not None and enough(number, outcomes[-1]):
                break
        return outcomes + [Outcome(status="skipped")] * (len(inputs) - len(outcomes))

    def run_check(self, program: Program, check: str, *, limits: Limits | None = None) -> Outcome:
        """Raises RewardError: a service runs one program, and the test must not share its process."""
        raise RewardError(
            "this problem has tests that run beside the program (loops, random inputs, helpers), which a remote "
            'sandbox cannot do: take reward.code.sandbox = "bubblewrap" or "landlock", or leave such problems out'
        )

    def close(self) -> None:
        """Nothing is kept open."""

    def _run_one(self, program: Program, given: bytes, limits: Limits, seconds: float) -> Outcome:
        mark = secrets.token_hex(16)
        told = {name: getattr(program, name) for name in ("mode", "prelude", "entry", "source")}
        told |= {"values": Path(values.__file__).read_text(), "recursion": limits.recursion, "mark": mark}
        request = {
            "code": _HARNESS.format(told=json.dumps(told)),
            "stdin": given.decode("utf-8", "replace"),
            "language": "python",
            "compile_timeout": seconds,
            "run_timeout": seconds,
            "memory_limit_MB": limits.memory_bytes // _MIB,
            "files": {},
            "fetch_files": [],
        }
        return _outcome(self._ask(request, seconds + _OVERHEAD_SECONDS), program, mark)

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        content, words = json.dumps(request).encode(), ""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for number in range(_TRIES):
            if number:
                self._wait(_WAIT_SECONDS * number)
            try:
                posted = urllib.request.Request(self._url, data=content, headers=headers)
                with self._opener.open(posted, timeout=seconds) as stream:
                    answer = json.load(stream)
            except urllib.error.HTTPError as error:
                words = f"status {error.code}"
                continue
            except (OSError, ValueError) as error:
                words = str(error)
                continue
            if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                return answer
            words = f"{str(answer)[:200]!r}"
        raise RewardError(
            f"the sandbox at {self._url} gave no result ({words}, {_TRIES} times); is it the address of "
            "SandboxFusion's run_code, and is the service up?"
        )


def _outcome(answer: dict[str, Any], program: Program, mark: str) -> Outcome:
    """What a service's answer says of one test."""
    ran = answer.get("run_result")
    if not isinstance(ran, dict):
        return Outcome(status="compile", note=str(answer.get("message") or "it was not run")[:300])
    stdout, stderr = str(ran.get("stdout") or ""), str(ran.get("stderr") or "")
    result = b""
    if program.mode != "stdin":
        stdout, _, value = stdout.rpartition(mark)
        result = value.encode("utf-8", "replace")
    ended: dict[str, Any] = {
        "stdout": stdout.encode("utf-8", "surrogatepass"),
        "stderr": stderr.encode("utf-8", "surrogatepass"),
        "result": result,
        "wall_seconds": float(ran.get("execution_time") or 0.0),
    }
    if ran.get("status") == "TimeLimitExceeded":
        return Outcome(status="timeout", note="the service's time limit", **ended)
    code = ran.get("return_code")
    if ran.get("status") == "Finished" and code == 0:
        return Outcome(status="done", **ended)
    last = stderr.strip().rpartition("\n")[2][:300]
    if last.startswith("MemoryError"):
        return Outcome(status="memory", note=last, **ended)
    return Outcome(status="crashed", note=last if "Traceback" in stderr else f"exit code {code}", **ended)
