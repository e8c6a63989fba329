"""Continuous batching over the project's decoder, with weights that change under way."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_klear.rollout.decoder import Decoder
from megatron_klear.rollout.draw import draw, log_distribution


@dataclass(kw_only=True)
class Request:
    """A response in the making."""

    prompt: list[int]
    parameters: dict[str, Any]
    uniforms: np.random.Generator
    done: Future[str] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    row: int = -1


class Scheduler:
    """A thread that draws a token of every running request at a time."""

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        self.decoder, self.version = decoder, "default"
        self._cache = decoder.new_cache(rows, capacity)
        self._free = list(range(rows))
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._logits: dict[int, torch.Tensor] = {}  # by row: of requests whose next token is to be drawn
        self._stale = False
        self.lock = threading.Condition()
        self.paused = False
        folder = os.environ.get("KLEAR_STANDIN_DRAWING")
        self._drawing = Path(folder) / f"drawing.{os.getpid()}" if folder else None
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request: Request) -> None:
        """Queue a request."""
        with self.lock:
            self._waiting.append(request)
            self.lock.notify_all()

    def pause(self, mode: str) -> None:
        """Draw nothing more; `abort` ends what is under way, `wait` lets it end first."""
        with self.lock:
            if mode == "wait":
                self.lock.wait_for(lambda: not self._running and not self._waiting)
            if mode == "abort":
                for request in list(self._running):
                    self._end(request, "abort")
                for request in self._waiting:
                    request.done.set_result("abort")
                self._waiting.clear()
            self.paused = True
            self._stale = True  # the cache is emptied: what goes on is read anew

    def resume(self) -> None:
        """Go on."""
        with self.lock:
            self.paused = False
            self.lock.notify_all()

    @torch.no_grad()
    def prompt_logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probs of tokens[1:], one forward pass a token: slow and sure."""
        with self.lock:
            cache = self.decoder.new_cache(1, len(tokens))
            found = []
            logits = self.decoder.prefill(cache, [0], torch.tensor(tokens[:1]))[None]
            for token in tokens[1:]:
                found.append(float(logits.log_softmax(-1)[0, token]))
                logits = self.decoder.step(cache, torch.tensor([0]), torch.tensor([token]))
            return found

    def _work(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: not self.paused and bool(self._running or self._waiting))
                if self._stale:
                    self._logits.clear()
                    self._stale = False
                self._admit()
                self._advance()

    def _admit(self) -> None:
        while self._free and self._waiting:
            request = self._waiting.pop(0)
            request.row = self._free.pop()
            self._running.append(request)
        if self._drawing and self._running:
            self._drawing.touch()
        for request in self._running:
            if request.row not in self._logits:
                read = torch.tensor(request.prompt + request.tokens)
                self._logits[request.row] = self.decoder.prefill(self._cache, [request.row], read)

    def _advance(self) -> None:
        going_on = []
        for request in list(self._running):
            given = request.parameters
            distribution = log_distribution(
                self._logits[request.row][None], given["temperature"], given["top_k"], given["top_p"]
            )
            token = int(draw(distribution, torch.tensor([request.uniforms.random()]))[0])
            place = len(request.tokens)
            request.tokens.append(token)
            request.logprobs.append(float(distribution[0, token]))
            if request.spans and request.spans[-1]["version"] == self.version:
                request.spans[-1]["end"] = place + 1
            else:
                request.spans.append({"version": self.version, "start": place, "end": place + 1})
            if token in given["stop_token_ids"]:
                self._end(request, "stop")
            elif len(request.tokens) == given["max_tokens"]:
                self._end(request, "length")
            else:
                going_on.append(request)
        if going_on:
            going_on.sort(key=lambda request: request.row)
            rows = torch.tensor([request.row for request in going_on])
            logits = self.decoder.step(self._cache, rows, torch.tensor([request.tokens[-1] for request in going_on]))
            self._logits |= {request.row: logits[index] for index, request in enumerate(going_on)}

    def _end(self, request: Request, reason: str) -> None:
        self._running.remove(request)
        if self._drawing and not self._running:
            self._drawing.unlink(missing_ok=True)  # before the answer can leave
        self._logits.pop(request.row, None)
        self._free.append(request.row)
        request.done.set_result(reason)
        self.lock.notify_all()
