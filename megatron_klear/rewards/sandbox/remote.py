"""A sandbox elsewhere: a service that speaks SandboxFusion's HTTP form.

`POST /run_code` with `code`, `language`, `stdin`, `run_timeout` and `memory_limit_MB`; what comes back names a `status`
and holds a `run_result` (github.com/bytedance/SandboxFusion). How well programs are kept apart there is the service's
affair; expected answers are not sent.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from megatron_klear.rewards.base import RewardError

from .endings import last_line
from .outcome import DEFAULT_LIMITS, Limits, Outcome, Program, Status, Verdict

_GRACE_SECONDS = 30.0
"""For the way, and for other programs that the service has to run first."""
_MOST_BYTES = 64 << 20
_RETRIES = 2
_BUSY = (429, 502, 503, 504)


class RemoteSandbox:
    """A Sandbox that asks a service, one connection a test; programs read standard input.

    It knows no peak memory, and `cpu_seconds` is the service's `execution_time`. Raises RewardError where the service
    cannot be reached or gives no answer of its form: that is never a program's fault.
    """

    def __init__(self, url: str, *, grace_seconds: float = _GRACE_SECONDS, retry_seconds: float = 1.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"the sandbox's address {url!r} is no http:// or https:// address")
        self._url, self._parts = url, parts
        self._grace_seconds, self._retry_seconds = grace_seconds, retry_seconds

    def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        *,
        limits: Limits = DEFAULT_LIMITS,
        passed: Verdict | None = None,
        enough: Verdict | None = None,
    ) -> list[Outcome]:
        """As `Sandbox.run` says; every test has a process of its own there."""
        if program.mode != "stdin" or program.prelude:
            raise RewardError(
                f"a remote sandbox runs programs that read standard input alone, and this one is of the mode "
                f"{program.mode!r}; use the sandbox called bubblewrap"
            )
        outcomes: list[Outcome] = []
        deadline = time.monotonic() + limits.total_seconds
        for index, stdin in enumerate(inputs):
            if time.monotonic() > deadline:
                outcomes.append(Outcome(status="timeout", note="the time of all tests of the program was up"))
                break
            outcomes.append(self._run(program.source, stdin, limits))
            if enough is not None and enough(index, outcomes[-1]):
                break
        return outcomes + [Outcome(status="skipped")] * (len(inputs) - len(outcomes))

    def run_check(self, program: Program, check: str, *, limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Not to be had there: raises RewardError."""
        raise RewardError("a remote sandbox runs no trusted tests; use the sandbox called bubblewrap")

    def close(self) -> None:
        """Nothing is open between tests."""

    def _run(self, source: str, stdin: bytes, limits: Limits) -> Outcome:
        if len(source.encode("utf-8", "surrogatepass")) > limits.source_bytes:
            return Outcome(status="compile", note=f"more than {limits.source_bytes} bytes of source")
        asked = {
            "code": source,
            "language": "python",
            "stdin": stdin.decode("utf-8", "surrogateescape"),
            "run_timeout": limits.wall_seconds,
            "memory_limit_MB": math.ceil(limits.memory_bytes / 2**20),
        }
        return _outcome(self._answer(json.dumps(asked).encode(), limits.wall_seconds), self._url)

    def _answer(self, content: bytes, seconds: float) -> Any:
        """What the service says, asked again where it is busy."""
        for left in reversed(range(_RETRIES + 1)):
            status, answer = self._post(content, seconds + self._grace_seconds)
            if status not in _BUSY or not left:
                break
            time.sleep(self._retry_seconds)
        if status != 200:
            words = answer[:200].decode(errors="replace").strip()
            raise RewardError(f"the sandbox at {self._url} answered with HTTP status {status}: {words}")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise RewardError(f"the sandbox at {self._url} answered with something that is no JSON") from None

    def _post(self, content: bytes, timeout_seconds: float) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=timeout_seconds)
        path = self._parts.path.rstrip("/") + "/run_code"
        try:
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read(_MOST_BYTES)
        except TimeoutError:
            raise RewardError(
                f"the sandbox at {self._url} did not answer within {timeout_seconds:.0f} s; it has too much to do, or "
                "is not there"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise RewardError(f"the sandbox at {self._url} cannot be asked: {error or type(error).__name__}") from None
        finally:
            connection.close()


def _outcome(answer: Any, url: str) -> Outcome:
    """An outcome from SandboxFusion's RunCodeResponse."""
    if isinstance(answer, dict) and answer.get("status") == "SandboxError":
        raise RewardError(f"the sandbox at {url} has failed: {str(answer.get('message'))[:200]}")
    try:
        run = answer["run_result"]
        seconds = float(run.get("execution_time") or 0)
        stdout, stderr = (str(run.get(name) or "").encode("utf-8", "surrogateescape") for name in ("stdout", "stderr"))
        ended, code = run["status"], run.get("return_code")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise RewardError(f"the sandbox at {url} gave an answer that is not of SandboxFusion's form") from None
    status: Status = "done"
    note = ""
    if ended == "TimeLimitExceeded":
        status, note = "timeout", "the service's time limit"
    elif ended != "Finished" or code != 0:
        status, note = "crashed", last_line(stderr) or f"exit {code}"
        status = "memory" if note.startswith("MemoryError") else status
    return Outcome(status=status, stdout=stdout, stderr=stderr, cpu_seconds=seconds, wall_seconds=seconds, note=note)
