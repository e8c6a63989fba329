"""How a benchmark's responses are drawn: named protocols, so that a figure says what it stands beside."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_klear.config.evaluation import ProtocolName, SamplingOverrides
from megatron_klear.config.rl import SamplingConfig
from megatron_klear.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Settings of sampling, for one benchmark."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int = 32768
    samples: int = 1
    extension: str = ""
    """How the model's context was extended, in words."""

    def local(self) -> SamplingConfig:
        """The same as the local engine's settings. Raises UserError where it lacks something."""
        if self.repetition_penalty != 1.0:
            raise UserError(
                f"the local engine has no repetition penalty, and the protocol asks for {self.repetition_penalty}: use "
                "an endpoint, another protocol, or --sampling.repetition-penalty 1"
            )
        return SamplingConfig(
            samples_per_prompt=self.samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def words(self) -> str:
        """In a line, for tables."""
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top_k {self.top_k}"] if self.top_k else []
        parts += [f"repetition penalty {self.repetition_penalty:g}"] if self.repetition_penalty != 1 else []
        parts += [f"{self.max_tokens:,} tokens"]
        return ", ".join([*parts, self.extension] if self.extension else parts)


_PROTOCOLS: dict[ProtocolName, Protocol] = {
    "paper": Protocol(temperature=0.6, top_p=0.95),  # arXiv 2508.07629, section 4.1
    "released": Protocol(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05),
    "qwen": Protocol(temperature=0.6, top_p=0.95, top_k=20),  # Qwen3's model card, thinking mode
    "greedy": Protocol(temperature=0.0),
}


def protocol_for(
    name: ProtocolName,
    overrides: SamplingOverrides,
    *,
    paper_samples: int,
    samples: int | None,
    long: int | None = None,
    extension: str = "",
) -> Protocol:
    """The protocol with what was set besides; `paper_samples` are the paper's for the benchmark, `samples` yours."""
    protocol = _PROTOCOLS[name]
    given = {key: value for key, value in overrides.model_dump().items() if value is not None}
    given |= {} if long is None else {"max_tokens": long}
    own = 1 if name == "greedy" else paper_samples
    return replace(protocol, samples=samples or own, extension=extension, **given)
