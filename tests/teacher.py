"""A teacher that the tests of curation ask: a server on a thread, whose answer depends on the request alone."""

import asyncio
import multiprocessing
import os
import signal
import threading
import zlib
from collections import Counter

from aiohttp import web
from curation_rows import curate

PROMPT_TOKENS = 7


def answer_to(text: str, seed: int) -> tuple[str | None, str, int]:
    """Content, finish and completion tokens of the teacher's answer: the prompt's own words decide."""
    number = zlib.crc32(f"{text}/{seed}".encode())
    if "filtered" in text:
        return None, "content_filter", 1
    if "silent" in text:
        return "", "stop", 1
    content = f"<think>\nSeed {seed}.\n</think>\n\nIt is \\boxed{{{number % 3}}}."
    return (content, "length", 10) if "long" in text else (content, "stop", 3 + number % 7)


class Teacher:
    """`faults` are by the number of a request, from 0: a status, or `break`, `cut` or `slow`."""

    def __init__(self) -> None:
        self.faults: dict[int, int | str] = {}
        self.asked: Counter[tuple[str, int]] = Counter()
        """Requests by the prompt's text and the seed."""
        self.answered: Counter[tuple[str, int]] = Counter()
        self.tokens = [0, 0]
        """Counted for every answer that was made, whether or not it arrived."""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(ready,), daemon=True).start()
        assert ready.wait(30)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text = body["messages"][-1]["content"]
        fault = self.faults.get(self.asked.total())
        self.asked[text, body["seed"]] += 1
        if "forbidden" in text:
            return web.Response(status=400, text="not such prompts")
        if isinstance(fault, int):
            return web.Response(status=fault, text="not now", headers={"Retry-After": "0"})
        content, finish, tokens = answer_to(text, body["seed"])
        self.tokens[0] += PROMPT_TOKENS
        self.tokens[1] += tokens
        told = {
            "choices": [{"message": {"content": content}, "finish_reason": finish}],
            "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens},
        }
        if fault == "slow":
            await asyncio.sleep(60)  # the client has long gone, which cancels this
        whole = web.json_response(told)
        if fault == "break":
            request.transport.close()
            return whole
        if fault == "cut":
            cut = web.StreamResponse(headers={"Content-Length": str(len(whole.body))})
            await cut.prepare(request)
            await cut.write(whole.body[:20])
            request.transport.close()
            return cut
        for _ in range(body["seed"] % 4):
            await asyncio.sleep(0)  # answers overtake each other
        self.answered[text, body["seed"]] += 1
        return whole

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    def close(self) -> None:
        """End the server."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def flags(self, **endpoint: object) -> list[object]:
        """What `klear curate` is told of the teacher."""
        given = {"urls": self.url, "model": "teacher", "concurrency": 4, "timeout_seconds": 0.5} | endpoint
        return [word for name, value in given.items() for word in (f"--endpoint.{name.replace('_', '-')}", value)]


def curate_until(instant: int, watched: list[tuple[object, str]], *arguments: object) -> bool:
    """`klear curate` in a child, killed at the `instant`th call of a watched function; whether it ended by itself."""
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(instant, watched, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def _killed_at(instant: int, watched: list[tuple[object, str]], arguments: tuple[object, ...]) -> None:
    left = instant

    def counted(function):
        def call(*given, **named):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    for owner, name in watched:
        setattr(owner, name, counted(getattr(owner, name)))
    curate(*arguments)
