"""Where responses come from: a model in this process, or servers of OpenAI's API."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

from megatron_klear.config.evaluation import EvaluatedModelConfig
from megatron_klear.errors import UserError
from megatron_klear.types import Prompt

from .benchmarks import Problem
from .protocols import Protocol
from .store import Response

_READ_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # config.json, generation_config.json, tokenizer, template
BATCHES = 4  # of `max_sequences` responses between two writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The responses to one problem that are still to be drawn, by their numbers."""

    problem: Problem
    numbers: tuple[int, ...]


Drawn = Callable[[Sequence[Response]], None]
"""Takes responses as they come."""


class Source(Interface):
    """Draws responses. A response depends on the model, the problem, its number and the seed."""

    def check(self, problems: Sequence[Problem], protocol: Protocol) -> None:
        """Raise UserError where it is known already that some cannot be drawn."""
        ...

    def draw(self, wanted: Sequence[Wanted], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        """Draw everything that is wanted. Raises UserError where that cannot be done."""
        ...

    def opening(self, problem: Problem) -> str:
        """The end of the prompt as the model was given it, which may have opened its thinking; "" where not known."""
        ...

    def extension(self) -> str:
        """How the model's context is extended beyond its training, in words; "" where it is not, or not known."""
        ...

    def identity(self) -> dict[str, str]:
        """What is told of the model in the file of responses, and must be the same to go on."""
        ...


class LocalSource:
    """A Hugging Face folder, sampled here by the engine that draws rollouts."""

    def __init__(self, config: EvaluatedModelConfig, thinking: bool | None) -> None:
        """Read tokenizer and weights. Raises UserError where the folder is no model that can be sampled."""
        import torch

        from megatron_klear.data.tokenizer import load_tokenizer
        from megatron_klear.mcore.model import inverse_frequencies
        from megatron_klear.mcore.weights import open_weights
        from megatron_klear.models.architecture import read_architecture
        from megatron_klear.models.names import expected_tensors
        from megatron_klear.models.stop_tokens import read_stop_tokens
        from megatron_klear.rollout.local.decoder import Decoder
        from megatron_klear.rollout.local.engine import LocalEngine

        assert config.path is not None
        self._path, self._thinking, self._rows = config.path, thinking, config.max_sequences
        self._dtype = config.dtype
        cuda = torch.cuda.is_available()
        if config.device == "cuda" and not cuda:
            raise UserError("model.device is cuda, and torch sees none; use auto or cpu")
        device = torch.device("cpu")
        if cuda and config.device != "cpu":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if device.index >= torch.cuda.device_count():
                raise UserError(f"process {device.index} of this machine has no GPU: start as many as there are")
        architecture = read_architecture(config.path)
        self._tokenizer = load_tokenizer(config.path)
        stop = read_stop_tokens(config.path, turn_end=self._tokenizer.turn_end, tokenizer_eos=self._tokenizer.eos)
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        frequencies, scaling = inverse_frequencies(architecture)
        self._engine = LocalEngine(
            Decoder(architecture, frequencies, scaling, dtype, device),
            stop_token_ids=stop.ids,
            max_sequences=config.max_sequences,
        )
        weights = open_weights(architecture, config.path)
        names = [spec.name for spec in expected_tensors(architecture)]
        self._engine.load_weights(((name, weights.tensor(name)) for name in names), 0)
        self._stop, self._architecture = frozenset(stop.ids), architecture

    def check(self, problems: Sequence[Problem], protocol: Protocol) -> None:
        """Raise UserError where the engine lacks a setting, or a prompt and its response go beyond the model."""
        protocol.local()
        longest = self._architecture.max_positions
        for problem in problems:
            tokens = len(self._tokenizer.encode(self.opening(problem)))
            if tokens + protocol.max_tokens > longest:
                raise UserError(
                    f"{problem.place}: a prompt of {tokens} tokens and a response of {protocol.max_tokens} go "
                    f"beyond the model's {longest} positions: lower --sampling.max-tokens, or extend the model "
                    "(--long, klear extend)"
                )

    def draw(self, wanted: Sequence[Wanted], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        """Draw whole problems, several at a time; what was there already is drawn again and is the same."""
        from megatron_klear.distributed import exchange  # which imports torch

        problems = max(1, BATCHES * self._rows * exchange.size() // protocol.samples)
        for start in range(0, len(wanted), problems):
            self._draw(wanted[start : start + problems], protocol, seed, drawn)

    def draw_for_the_first(self) -> None:
        """On all processes but the first: draw a share of everything that it draws, until it is done."""
        from megatron_klear.distributed import exchange

        while (asked := exchange.tell_all(None)) is not None:
            self._engine.draw(*asked)

    def opening(self, problem: Problem) -> str:
        """The prompt's text."""
        return self._tokenizer.template.render(problem.messages, generation_prompt=True, thinking=self._thinking)

    def extension(self) -> str:
        """YaRN's factor and the positions it starts from, where config.json has it."""
        rope = self._architecture.rope
        values = dict(rope.parameters)
        if rope.kind != "yarn":
            return ""
        return f"YaRN {values['factor']:g} over {values['original_max_position_embeddings']:,} positions"

    def identity(self) -> dict[str, str]:
        """The folder, the precision, size and time of its weights, and a digest of its settings and tokenizer."""
        weights = sorted(self._path.glob("*.safetensors"))
        told = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in weights]
        return {
            "model": str(self._path.resolve()),
            "weights": "; ".join(told),
            "dtype": self._dtype,
            "files": _digest_of_files(self._path),
        }

    def _draw(self, wanted: Sequence[Wanted], protocol: Protocol, seed: int, drawn: Drawn) -> None:
        prompts = []
        for one in wanted:
            text = self.opening(one.problem)
            tokens = self._tokenizer.encode(text)
            prompts.append(
                Prompt(
                    id=one.problem.id, data_source=one.problem.data_source, tokens=tokens, text=text, ground_truth=None
                )
            )
        drawn(list(self._responses(wanted, prompts, protocol, seed)))

    def _responses(
        self, wanted: Sequence[Wanted], prompts: Sequence[Prompt], protocol: Protocol, seed: int
    ) -> Iterator[Response]:
        from megatron_klear.distributed import exchange
        from megatron_klear.rollout.engine import group_of

        exchange.tell_all((prompts, protocol.local(), seed))
        drawn = self._engine.draw(prompts, protocol.local(), seed)
        for one, prompt, samples in zip(wanted, prompts, drawn, strict=True):
            group = group_of(prompt, samples, self._tokenizer.decode, self._stop)
            for number in one.numbers:
                sample = samples[number]
                yield Response(
                    problem=one.problem.id,
                    number=number,
                    text=group.texts[number],
                    finish="stop" if sample.finish == "stop" else "length",
                    num_tokens=int(sample.trained.sum()),
                )


def _digest_of_files(folder: Path) -> str:
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_SUFFIXES and path.is_file():
            found.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()
