"""Looks at the way from the trainer to the sampler with a run's own engines: do weights arrive, are log-probs equal.

Collective: every process of the run calls these together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.config.start import GPPOStart
from megatron_klear.data.pack import pack
from megatron_klear.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_klear.distributed import exchange
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.model import DTYPES, inverse_frequencies
from megatron_klear.mcore.topology import world
from megatron_klear.rollout.local.decoder import Decoder
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.train.rollouts import Rollouts
from megatron_klear.train.turn_end import stop_tokens_of
from megatron_klear.train.weight_sync import (
    TOLERANCES,
    OwnSampler,
    ServersWeights,
    WeightsNotArrived,
    open_trainer,
    sent_weights,
)
from megatron_klear.types import Sample
from megatron_klear.verify.mismatch import Evidence, Finding, diagnose, mean_difference

_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutReport:
    """Findings, and the mean difference of log-probs in nats over `tokens` response tokens."""

    findings: list[Finding]
    mean: float
    tokens: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Nothing was found, and the difference is within the tolerance."""
        return self.mean <= self.tolerance and not any(finding.verdict == "found" for finding in self.findings)


def verify_weights(start: GPPOStart, tolerance: float | None = None) -> RolloutReport:
    """Send the weights, compare checksums of every tensor, and let both sides score one sampled row."""
    with _opened(start) as opened:
        engine, rollouts = opened.engine, opened.rollouts
        try:
            rollouts.sync(_VERSION)
            arrived = Finding(cause="weights", verdict="clear", detail=f"{_count(engine)} tensors have equal checksums")
        except WeightsNotArrived as error:
            arrived = Finding(cause="weights", verdict="found", detail=str(error))
        samples = rollouts.sample(1)[:1]
        mean = mean_difference([_response(s, s.logprobs) for s in samples], _rescore(engine, samples, _heat(start)))
        limit = _tolerance(start, tolerance)
        detail = f"a row of {len(samples[0].tokens)} tokens: mean difference of log-probs {mean:.2e}, limit {limit:g}"
        echo = Finding(cause="echo", verdict="clear" if mean <= limit else "found", detail=detail)
    return RolloutReport(findings=[arrived, echo], mean=mean, tokens=_tokens(samples), tolerance=limit)


def verify_mismatch(start: GPPOStart, prompts: int = 4, tolerance: float | None = None) -> RolloutReport:
    """Sample a few prompts with the run's settings and say what a mismatch comes from."""
    with _opened(_with_routes(start)) as opened:
        with suppress(WeightsNotArrived):  # the evidence says which, and what follows from it
            opened.rollouts.sync(_VERSION)
        samples = opened.rollouts.sample(prompts)
        held = exchange.tell_all(opened.trainer.held)
        evidence = gather(start, opened.engine, samples, opened.tokenizer, held)
    limit = _tolerance(start, tolerance)
    mean = mean_difference(evidence.sampler, evidence.trainer)
    return RolloutReport(findings=diagnose(evidence, limit), mean=mean, tokens=_tokens(samples), tolerance=limit)


def gather(
    start: GPPOStart,
    engine: Engine,
    samples: Sequence[Sample],
    tokenizer: ChatTokenizer,
    held: dict[str, dict[str, str]],
) -> Evidence:
    """All that `diagnose` reads; `held` are the checksums that each holder of the sampler's weights gave."""
    sampling, temperature = start.config.sampling, _heat(start)
    weights = {name: tensor.detach().float().cpu() for name, tensor in engine.hf_weights()}
    stale = [
        name
        for name, tensor in sent_weights(engine)
        if not all(_is_held(tensor, checksums.get(name)) for checksums in held.values())
    ]
    stale += sorted({f"samples of version {s.policy_version}" for s in samples if s.policy_version != _VERSION})
    responses = [sample.tokens[sample.trained] for sample in samples]
    replays = start.config.algorithm.router_replay == "sampler"
    own = [replace(sample, routes=None) for sample in samples]
    routed = [sample for sample in samples if sample.routes is not None]
    return Evidence(
        sampler=[_response(sample, sample.logprobs) for sample in samples],
        trainer=_rescore(engine, samples if replays else own, temperature),
        rerouted=_rescore(engine, own if replays else samples, temperature) if routed else None,
        is_replayed=replays,
        temperature=temperature,
        at_temperature={
            other: _rescore(engine, samples if replays else own, other)
            for other in _TEMPERATURES
            if other != temperature
        },
        exact=_exact(start, weights, samples, temperature),
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        round_trip=[bool(np.array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)) for ids in responses],
        stale=stale,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    engine: Engine
    rollouts: Rollouts
    trainer: OwnSampler | ServersWeights
    tokenizer: ChatTokenizer


@contextmanager
def _opened(start: GPPOStart) -> Iterator[_Opened]:
    train = start.config.train.model_copy(update={"keep_rollouts": False})  # the run itself may be going on
    start = replace(start, config=start.config.model_copy(update={"train": train}))
    config = start.config
    with world(config.parallel, config.seed) as topology, Rollouts(start) as rollouts:
        tokenizer = load_tokenizer(config.model.path, config.prompts.chat_template)
        rollouts.read_prompts()
        engine = Engine(config, topology, architecture=start.architecture)
        with closing(open_trainer(engine, config, stop_tokens_of(config.model.path, tokenizer).ids)) as trainer:
            rollouts.trainer = trainer
            trainer.connect(rollouts.open())
            yield _Opened(engine=engine, rollouts=rollouts, trainer=trainer, tokenizer=tokenizer)
            rollouts.close()
        engine.close()


def _with_routes(start: GPPOStart) -> GPPOStart:
    """The run with a sampler that tells the experts of every token, where this process has it start so."""
    rollout, algorithm = start.config.rollout, start.config.algorithm
    if start.architecture.experts is None or (isinstance(rollout, VLLMRolloutConfig) and rollout.servers):
        return start
    told = algorithm.model_copy(update={"router_replay": "sampler"})
    return replace(start, config=start.config.model_copy(update={"algorithm": told}))


def _response(sample: Sample, values: npt.NDArray[np.generic] | None) -> npt.NDArray[np.float64]:
    if values is None:
        raise ValueError("the rollout engine gave no log-probs")
    return np.asarray(values)[sample.trained].astype(np.float64)


def _rescore(engine: Engine, samples: Sequence[Sample], temperature: float) -> list[npt.NDArray[np.float64]]:
    """The trainer's log-probs of the responses, each sample in a row of its own."""
    batches = [pack([sample], [1.0]) for sample in samples]
    scored = engine.logprobs(batches, temperature=temperature)
    return [v.double().numpy()[b.weights.numpy() != 0] for v, b in zip(scored, batches, strict=True)]


def _exact(
    start: GPPOStart, weights: dict[str, Tensor], samples: Sequence[Sample], temperature: float
) -> list[npt.NDArray[np.float64]]:
    """Log-probs of the responses in fp32 throughout, on the CPU."""
    frequencies, scaling = inverse_frequencies(start.architecture)
    decoder = Decoder(start.architecture, frequencies, scaling, torch.float32, torch.device("cpu"))
    decoder.load(weights.items())
    scored = []
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        head = int(np.argmax(sample.trained))
        cache = decoder.new_cache(1, len(tokens))
        logits = [decoder.prefill(cache, [0], tokens[:head])[None]]
        row = torch.zeros(1, dtype=torch.int64)
        logits += [decoder.step(cache, row, tokens[place : place + 1]) for place in range(head, len(tokens) - 1)]
        logprobs = (torch.cat(logits).double() / temperature).log_softmax(-1)
        scored.append(logprobs.gather(-1, tokens[head:, None]).squeeze(-1).numpy())
    return scored


def _is_held(sent: Tensor, held: str | None) -> bool:
    if held is None:
        return False
    dtype: torch.dtype = getattr(torch, held.split(":", 1)[0])
    return checksum(sent.to(dtype)) == held


def _count(engine: Engine) -> int:
    return sum(1 for _ in sent_weights(engine))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(int(sample.trained.sum()) for sample in samples)


def _heat(start: GPPOStart) -> float:
    return start.config.sampling.temperature or 1.0


def _tolerance(start: GPPOStart, tolerance: float | None) -> float:
    return TOLERANCES[DTYPES[start.config.model.dtype]] if tolerance is None else tolerance
