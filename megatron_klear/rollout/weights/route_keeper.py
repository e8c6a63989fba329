"""Experts of every token on a vLLM server on the CPU, kept by its worker until they are asked for; imports vllm.

vLLM's --enable-return-routed-experts is of its second model runner alone, which needs Triton (0.32). On the CPU the
first one runs: its routers have the same hook, and `keep_routes` notes behind each pass which rows of it were whose
tokens. Prefix caching must be off, for a token that is not read again goes through no router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

MOST_ENDED = 4096
"""Requests that ended and were not asked for, as of a client that is gone; older ones are forgotten."""


class RouteKeeper:
    """Routes of a worker's requests, from the first token on, each as the token was first read.

    A token that is read again, as after new weights, keeps the experts with which the token behind it was drawn.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._pass: dict[int, Tensor] = {}
        self._kept: dict[str, list[npt.NDArray[np.uint16]]] = {}
        self._ended: dict[str, None] = {}
        for module in model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._pass.__setitem__, module.layer_id))

    def ended(self, requests: Iterable[str]) -> None:
        """Requests that get no more tokens."""
        self._ended |= dict.fromkeys(name for name in requests if name in self._kept)
        while len(self._ended) > MOST_ENDED:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self._kept[oldest]

    def note(self, requests: Sequence[str], read: Mapping[str, int], before: npt.NDArray[np.integer]) -> None:
        """The pass just run read `read` tokens of each request, in this order, behind `before` others [requests]."""
        rows = torch.stack([self._pass[layer] for layer in sorted(self._pass)], dim=1).numpy().astype(np.uint16)
        end = 0
        for name, first in zip(requests, before.tolist(), strict=False):
            start, end = end, end + read[name]
            kept = self._kept.setdefault(name, [])
            known = sum(map(len, kept))
            if first > known:
                raise RuntimeError(f"{name}: tokens {known} to {first} were never read; is prefix caching on?")
            if first + end - start > known:
                kept.append(rows[start + known - first : end])
        self._pass.clear()

    def take(self, request: str, start: int, end: int) -> npt.NDArray[np.uint16]:
        """Routes of tokens `start` to `end` of a request by its own name, which is forgotten."""
        # vLLM adds eight characters to a request's name.
        names = [name for name in self._kept if name.rpartition("-")[0] == request]
        if not names:
            raise ValueError(f"this worker has read no token of request {request}")
        rows = np.concatenate(self._kept.pop(names[-1]))
        self._ended.pop(names[-1], None)
        return rows[start:end]


def keep_routes() -> None:
    """Have the CPU's model runners of this process keep routes, as their attribute `klear_routes`."""
    execute = CPUModelRunner.execute_model

    def execute_model(runner: Any, scheduler_output: Any, *arguments: Any, **options: Any) -> Any:
        if not hasattr(runner, "klear_routes"):
            runner.klear_routes = RouteKeeper(runner.model)
        keeper: RouteKeeper = runner.klear_routes
        keeper.ended(scheduler_output.finished_req_ids)
        output = execute(runner, scheduler_output, *arguments, **options)
        if scheduler_output.total_num_scheduled_tokens:
            batch = runner.input_batch
            keeper.note(batch.req_ids, scheduler_output.num_scheduled_tokens, batch.num_computed_tokens_cpu)
        return output

    CPUModelRunner.execute_model = execute_model
