"""Sampling in the training processes: every rank draws its share of the prompts from a whole copy of the policy.

The copy comes from `Engine.hf_weights`, tensor by tensor, so it does not matter how the trainer is laid out; the model
must fit on one device. Larger ones want a server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.config.rl import SamplingConfig
from megatron_klear.distributed import exchange
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.local.decoder import Cache, Decoder
from megatron_klear.rollout.local.draw import UniformStream, draw, log_distribution
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.types import Prompt, Routes, Sample, route_type

_UNIFORMS = 256


@dataclass(kw_only=True, slots=True)
class _Sequence:
    """One response in the making."""

    prompt: int
    number: int
    uniforms: UniformStream
    tokens: list[int]
    logprobs: list[float]
    routes: list[Routes]
    """Of tokens as they were read, [tokens of the pass, layers, chosen]; empty where they are not kept."""


class LocalEngine:
    """Draws on this process's device; all ranks call it together."""

    def __init__(self, decoder: Decoder, *, stop_token_ids: Iterable[int], max_sequences: int) -> None:
        """`stop_token_ids` end a response, besides those of the sampling."""
        self._decoder = decoder
        self._stop = frozenset(stop_token_ids)
        self._rows = max_sequences
        self.version = -1

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights sampled with."""
        return self._decoder.dtype

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Checksums:
        """Take the weights; returns a checksum by name of what is held now."""
        self._decoder.load(weights)
        self.version = version
        return {"local": {name: checksum(tensor) for name, tensor in self._decoder.weights.items()}}

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[list[Sample]]:
        """`samples_per_prompt` samples of each prompt, in order, on rank 0; the prompts are dealt over all ranks.

        Every rank passes the same prompts, of which ids and tokens are read. A sample depends on the weights, its
        prompt and a generator seeded by (`seed`, prompt id, number of the sample) alone.
        """
        if self.version < 0:
            raise RuntimeError("the rollout engine has no weights yet: call load_weights first")
        mine = list(range(exchange.rank(), len(prompts), exchange.size()))
        finished = self._sample([prompts[index] for index in mine], sampling, seed)
        own = dict(zip(mine, finished, strict=True))
        whole = {index: samples for share in exchange.gather_first(own) for index, samples in share.items()}
        return [whole[index] for index in range(len(prompts) if exchange.is_first() else 0)]

    def sleep(self) -> None:
        """Give back the fused copies of the weights."""
        self._decoder.free()

    def _sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[list[Sample]]:
        if not prompts:
            return []
        count = sampling.samples_per_prompt
        batch = _Batch(self._decoder, prompts, sampling, rows=min(self._rows, len(prompts) * count), seed=seed)
        stop = self._stop | set(sampling.stop_token_ids)
        samples: list[list[Sample | None]] = [[None] * count for _ in prompts]
        for sequence, finish in batch.run(stop):
            samples[sequence.prompt][sequence.number] = _as_sample(
                prompts[sequence.prompt], sequence, finish, self.version
            )
        return [[sample for sample in drawn if sample is not None] for drawn in samples]


class _Batch:
    """Sequences decoded together; a row that ends is given to the next sequence at once."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], sampling: SamplingConfig, *, rows: int, seed: int
    ) -> None:
        self._decoder, self._prompts, self._sampling, self._seed = decoder, prompts, sampling, seed
        # Longest prompts first: their cache rows are the widest, and short ones fill the end.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].tokens))
        self._waiting = deque((index, number) for index in order for number in range(sampling.samples_per_prompt))
        self._free = list(range(rows))
        longest = max(len(prompt.tokens) for prompt in prompts)
        self._cache: Cache = decoder.new_cache(rows, longest + sampling.max_tokens)
        self._active: list[tuple[int, _Sequence]] = []
        self._uniforms: npt.NDArray[np.float64] = np.empty((rows, _UNIFORMS))

    def run(self, stop: frozenset[int] | set[int]) -> Iterable[tuple[_Sequence, str]]:
        """Decode everything; yields each sequence with "stop" or "length" as it ends."""
        logits = self._admit(None)
        while self._active:
            tokens, logprobs = self._draw(logits)
            drawn, their_logprobs = tokens.tolist(), logprobs.tolist()  # two waits for the device, not two a sequence
            kept: list[int] = []
            for place, (row, sequence) in enumerate(self._active):
                sequence.tokens.append(drawn[place])
                sequence.logprobs.append(their_logprobs[place])
                if sequence.tokens[-1] in stop:
                    yield sequence, "stop"
                elif len(sequence.tokens) == self._sampling.max_tokens:
                    yield sequence, "length"
                else:
                    kept.append(place)
                    continue
                self._free.append(row)
            self._active = [self._active[place] for place in kept]
            if kept:
                device = self._decoder.device
                rows = torch.tensor([row for row, _ in self._active], device=device)
                logits = self._decoder.step(self._cache, rows, tokens[torch.tensor(kept, device=device)])
                if self._decoder.keeps_routes:
                    routes = self._routes()
                    for place, (_, sequence) in enumerate(self._active):
                        sequence.routes.append(routes[place : place + 1])
            logits = self._admit(logits if kept else None)

    def _admit(self, logits: Tensor | None) -> Tensor:
        """Give free rows to waiting sequences; a prompt is read once for all of its samples admitted together."""
        parts = [] if logits is None else [logits]
        while self._free and self._waiting:
            index = self._waiting[0][0]
            rows: list[int] = []
            admitted: list[_Sequence] = []
            while self._free and self._waiting and self._waiting[0][0] == index:
                _, number = self._waiting.popleft()
                row = self._free.pop()
                stream = UniformStream(self._seed, self._prompts[index].id, number)
                admitted.append(
                    _Sequence(prompt=index, number=number, uniforms=stream, tokens=[], logprobs=[], routes=[])
                )
                rows.append(row)
            self._active += zip(rows, admitted, strict=True)
            tokens = torch.from_numpy(self._prompts[index].tokens.astype(np.int64)).to(self._decoder.device)
            parts.append(self._decoder.prefill(self._cache, rows, tokens)[None].expand(len(rows), -1))
            if self._decoder.keeps_routes:
                of_prompt = self._routes()
                for sequence in admitted:
                    sequence.routes.append(of_prompt)
        if not parts:
            return torch.empty(0)
        # In order of cache rows, so that a full batch reads the cache as it lies.
        order = sorted(range(len(self._active)), key=lambda place: self._active[place][0])
        self._active = [self._active[place] for place in order]
        joined = torch.cat(parts)
        return joined[torch.tensor(order, device=joined.device)]

    def _routes(self) -> Routes:
        """Of the last pass, on the host: a wait for the device."""
        experts = self._decoder.architecture.experts
        assert experts is not None
        kept: Routes = self._decoder.routes.cpu().numpy().astype(route_type(experts.count))
        return kept

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every active sequence, and its log-prob under the distribution sampled from."""
        sampling = self._sampling
        uniforms = np.empty(len(self._active))
        for place, (row, sequence) in enumerate(self._active):
            column = len(sequence.tokens) % _UNIFORMS
            if column == 0:
                self._uniforms[row] = sequence.uniforms.take(_UNIFORMS)
            uniforms[place] = self._uniforms[row, column]
        distribution = log_distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        tokens = draw(distribution, torch.from_numpy(uniforms).to(logits.device))
        return tokens, distribution.gather(-1, tokens[:, None]).squeeze(-1)


def _as_sample(prompt: Prompt, sequence: _Sequence, finish: str, version: int) -> Sample:
    head = len(prompt.tokens)
    return Sample(
        tokens=np.concatenate([prompt.tokens, np.array(sequence.tokens, dtype=np.int32)]),
        trained=np.arange(head + len(sequence.tokens)) >= head,
        logprobs=np.concatenate([np.zeros(head, dtype=np.float32), np.array(sequence.logprobs, dtype=np.float32)]),
        policy_version=version,
        finish="stop" if finish == "stop" else "length",
        routes=np.concatenate(sequence.routes) if sequence.routes else None,
    )
