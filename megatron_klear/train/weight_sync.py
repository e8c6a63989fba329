"""The policy on its way into rollouts: weights to servers, with proof that they arrived, or samples drawn here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_klear.config.checks_lora import adapter_sent
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.data.pack import pack
from megatron_klear.distributed import exchange
from megatron_klear.errors import UserError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.model import DTYPES, inverse_frequencies
from megatron_klear.orchestrator.trainer import Delivery, probe_row
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.local.decoder import Decoder
from megatron_klear.rollout.local.engine import LocalEngine
from megatron_klear.rollout.vllm.client import Portal, ServerClient, ServerError, open_session
from megatron_klear.rollout.weights.base import open_transport
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.rollout.weights.update import TransferFailed
from megatron_klear.types import Prompt, Sample

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from megatron_klear.config.rl import SamplingConfig
    from megatron_klear.rollout.vllm.open import Access

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Mean difference of log-probs in nats that rounding alone does not reach, by the coarser of the two precisions."""
_DTYPES = DTYPES | {"fp16": torch.float16}
_ATTACH_SECONDS = 180.0


class WeightsNotArrived(UserError):
    """The rollout engine holds other weights than it was sent."""


class OwnSampler:
    """The Drawer of a run whose training processes draw themselves. Every method is collective."""

    def __init__(self, engine: Engine, sampler: LocalEngine) -> None:
        self._engine, self._sampler = engine, sampler
        self.held: Checksums = {}
        """What the sampler held after the last sync, on rank 0."""

    def connect(self, access: Access | None) -> None:
        """There are no servers."""

    def load(self, version: int) -> None:
        """Give the present weights to the sampler and compare every tensor's checksum; see Drawer."""
        sent: dict[str, str] = {}
        self.held = self._sampler.load_weights(_noted(self._engine.hf_weights(), sent, self._sampler.dtype), version)
        exchange.same_outcome(lambda: _compare(self.held, sent, version))

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> list[list[Sample]]:
        """Draw, each rank its share of the prompts; see Drawer."""
        return self._sampler.draw(prompts, sampling, seed)

    def free(self) -> None:
        """Give back the fused copies of the weights."""
        self._sampler.sleep()

    def close(self) -> None:
        """Nothing was opened."""


class ServersWeights:
    """The Sender of a run that draws from servers. Every method is collective; rank 0 alone talks to servers."""

    def __init__(self, engine: Engine, config: VLLMRolloutConfig) -> None:
        """Open the transport. Raises UserError where it cannot work here."""
        self._engine, self._config, self._vocab_size = engine, config, engine.architecture.vocab_size
        named = config.server.dtype
        self._dtype = _DTYPES[engine.run.model.dtype if named == "model" else named]
        topology = engine.topology
        self._transport = exchange.same_outcome(
            lambda: open_transport(
                config,
                dtype=self._dtype,
                device=topology.device,
                rank=topology.rank,
                world_size=topology.size,
                adapter=adapter_sent(engine.run.lora, engine.architecture),
            )
        )
        self._portal: Portal | None = None
        self._session: ClientSession | None = None
        self._clients: dict[str, ServerClient] = {}
        self.held: Checksums = {}
        """What each worker of a server held after the last sync, on rank 0."""

    def connect(self, access: Access | None) -> None:
        """Rank 0: remember where servers are; None on the others."""
        if access is None:
            return
        self._portal = portal = Portal()

        async def connected() -> None:
            self._session = session = open_session(len(access.addresses))
            for url in access.addresses:
                self._clients[url] = ServerClient(
                    url, session=session, api_key=access.api_key, vocab_size=self._vocab_size
                )

        portal.run(connected())

    def make_room(self) -> None:
        """Offload the engine; see Sender."""
        self._engine.sleep()

    def deliver(self, version: int, urls: Sequence[str], gone: Sequence[str]) -> Delivery:
        """Send the weights, and compare what every worker holds with what was sent; see Sender."""
        sent: dict[str, str] = {}
        # Told to all before any gathers weights: in that the others would wait for a rank that gave up here.
        unready = exchange.on_first_rank(lambda: self._attach(urls, gone)) or {}
        delivery = exchange.same_outcome(lambda: self._deliver(version, urls, unready, sent))
        exchange.on_first_rank(lambda: _compare(self.held, sent, version))
        return delivery

    def check_echo(self, version: int, answers: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Compare every server's log-probs of the probe row with the engine's; see Sender."""
        tokens = probe_row(self._vocab_size)
        row = Sample(tokens=tokens, trained=np.arange(len(tokens)) > 0)
        own = self._engine.logprobs([pack([row], [1.0])])[0].cpu().numpy()[:-1]
        tolerance = self._config.probe_tolerance
        limit = tolerance or max(TOLERANCES[self._dtype], TOLERANCES[DTYPES[self._engine.run.model.dtype]])
        for server, values in answers.items():
            difference = float(np.abs(values - own).mean())
            if not difference <= limit:
                raise WeightsNotArrived(
                    f"after sync {version} {server} loaded the trainer's tensors but does not sample with them: its "
                    f"log-probs of the probe row differ by {difference:.3g} nats on average, limit {limit:g} "
                    "(rollout.probe_tolerance). Some of its weights are stale"
                )

    def close(self) -> None:
        """Give back files and connections."""
        self._transport.close()
        if self._portal is not None:
            if self._session is not None:
                self._portal.run(self._session.close(), 20)
            self._portal.close()

    def _deliver(self, version: int, urls: Sequence[str], unready: Mapping[str, str], sent: dict[str, str]) -> Delivery:
        weights = sent_weights(self._engine)
        if self._portal is None:
            self._transport.send(weights, version, (), None)
            return Delivery(holders=())
        failures = dict(unready)
        servers = [self._clients[url] for url in urls if url not in failures]
        try:
            self.held = self._transport.send(_noted(weights, sent, self._dtype), version, servers, self._portal)
        except TransferFailed as error:
            self.held = error.checksums
            failures |= error.failures
        finally:
            for _ in weights:  # the others gather them to the end, whatever ended the sending here
                pass
        return Delivery(holders=tuple(self.held), failures=failures)

    def _attach(self, urls: Sequence[str], gone: Sequence[str]) -> dict[str, str]:
        """Get to know the servers, those of `gone` anew; why not, by the address of those that do not answer."""
        assert self._portal is not None
        for url in gone:
            self._transport.detach(url)

        async def together() -> list[BaseException | None]:
            calls = (self._transport.attach([self._clients[url]]) for url in urls)
            return await asyncio.gather(*calls, return_exceptions=True)

        failures = {}
        for url, outcome in zip(urls, self._portal.run(together(), _ATTACH_SECONDS), strict=True):
            if isinstance(outcome, ServerError):
                failures[url] = str(outcome)
            elif outcome is not None:
                raise outcome
        return failures


def open_trainer(engine: Engine, config: GPPOConfig, stop_token_ids: Sequence[int]) -> OwnSampler | ServersWeights:
    """What grants the orchestrator's wishes under `[rollout]`. Raises UserError where it cannot work here."""
    architecture = engine.architecture
    if isinstance(config.rollout, VLLMRolloutConfig):
        return ServersWeights(engine, config.rollout)
    frequencies, scaling = inverse_frequencies(architecture)
    dtype = torch.float32 if config.rollout.dtype == "fp32" else DTYPES[config.model.dtype]
    keeps_routes = config.algorithm.router_replay == "sampler"
    decoder = Decoder(architecture, frequencies, scaling, dtype, engine.topology.device, keep_routes=keeps_routes)
    sampler = LocalEngine(decoder, stop_token_ids=stop_token_ids, max_sequences=config.rollout.max_sequences)
    return OwnSampler(engine, sampler)


def sent_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What samplers are sent, whole, on every rank."""
    if adapter_sent(engine.run.lora, engine.architecture) is None:
        return engine.hf_weights()
    return engine.adapter_weights()


def _noted(
    weights: Iterator[tuple[str, Tensor]], sent: dict[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        # In the precision held: the engine may keep another than the trainer's.
        sent[name] = checksum(tensor.to(dtype))
        yield name, tensor


def _compare(held: Checksums, sent: Mapping[str, str], version: int) -> None:
    for holder, checksums in held.items():
        missing = sorted(set(sent) ^ set(checksums))
        wrong = [name for name in sorted(set(sent) & set(checksums)) if sent[name] != checksums[name]]
        if missing or wrong:
            named = ", ".join((wrong + missing)[:5])
            raise WeightsNotArrived(
                f"after sync {version} the rollout engine ({holder}) does not hold the trainer's weights: {len(wrong)} "
                f"tensors differ and {len(missing)} are on one side only ({named}). Samples from it would not be of "
                "this policy; python tools/verify.py weights --config RUN.toml looks closer"
            )
