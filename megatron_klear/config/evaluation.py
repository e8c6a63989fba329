"""What `evaluate.py` is told: a model or an endpoint, benchmarks, a protocol. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_klear.config.base import Settings
from megatron_klear.config.rl import RewardConfig

ProtocolName = Literal["paper", "released", "qwen", "greedy"]


class EvaluatedModelConfig(Settings):
    """`[model]`: a Hugging Face folder that this process samples from itself."""

    path: Path | None = None
    """Model folder: config.json, tokenizer files, safetensors. Of a Megatron checkpoint make one with `klear convert`.
    Unset where responses come from an endpoint."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_sequences: PositiveInt = 64
    """Sequences decoded at once."""


class EndpointConfig(Settings):
    """`[endpoint]`: servers of OpenAI's API (vLLM, SGLang, a paid one) that hold the model."""

    urls: tuple[str, ...] = ()
    """Base addresses, `http://127.0.0.1:8000/v1`; requests are shared out over them."""
    model: str = ""
    """The model's name there."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent where it is empty."""
    concurrency: PositiveInt = 64
    """Requests under way at a time, over all addresses."""
    max_requests_per_minute: PositiveInt | None = None
    """Limit on requests begun, tries counted one by one, spread evenly."""
    attempts: PositiveInt = 6
    """Tries of one request, with growing pauses after 408, 409, 425, 429, 5xx, timeouts and broken connections."""
    timeout_seconds: float = Field(default=3600, gt=0)
    """For one response."""
    extensions: bool = True
    """Send what servers of open models understand beyond OpenAI's own: `top_k`, `repetition_penalty`."""

    @model_validator(mode="after")
    def _check(self) -> EndpointConfig:
        for url in self.urls:
            if not url.startswith(("http://", "https://")) or url.rstrip("/").endswith("/completions"):
                raise ValueError(f"endpoint.urls has {url!r}, expected a base address as in http://127.0.0.1:8000/v1")
        return self


class BenchmarkConfig(Settings):
    """One of `benchmarks`: problems to solve, by a known name or of your own."""

    name: str
    """A known benchmark (`python evaluate.py --benchmarks` lists them), which says how its files are read and what was
    published for it; or any other name, with rows of the form that training takes."""
    files: tuple[str, ...] = ()
    """JSONL (.jsonl.gz too), JSON lists or Parquet, paths or globs. Empty for a benchmark whose problems come with a
    package."""
    samples: PositiveInt | None = None
    """Responses to each problem; unset is the protocol's number for this benchmark."""
    limit: PositiveInt | None = None
    """Take only the first problems."""
    subset: str = ""
    """Of a file that holds several benchmarks, the one to take (its `subset_for_metrics`)."""
    since: str = ""
    until: str = ""
    """LiveCodeBench: contests on `since` and later, before `until`, as YYYY-MM-DD."""


class SamplingOverrides(Settings):
    """`[sampling]`: what differs from the protocol; unset is the protocol's."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    max_tokens: PositiveInt | None = None


class EvaluationConfig(Settings):
    """Settings of `evaluate.py`."""

    output: Path
    """Folder for responses, grades, table and report. An evaluation that was stopped goes on there."""
    protocol: ProtocolName = "paper"
    """How responses are drawn: `paper` (temperature 0.6, top_p 0.95, 32K tokens, 64 samples of AIME and HMMT, 8 of
    LiveCodeBench), `released` (top_k 20 and repetition penalty 1.05 besides, as the released script has it), `qwen`
    (top_k 20), `greedy` (one response at temperature 0)."""
    long: PositiveInt | None = None
    """Tokens of a response where the model's context is extended by YaRN: 65536 is the paper's 64K. The extended folder
    is `output/long_model` (`klear extend`, factor 2.5 over the trained positions); unset, the model is taken as is."""
    seed: int = Field(default=0, ge=0)
    model: EvaluatedModelConfig = EvaluatedModelConfig()
    endpoint: EndpointConfig = EndpointConfig()
    benchmarks: tuple[BenchmarkConfig, ...]
    sampling: SamplingOverrides = SamplingOverrides()
    thinking: bool | None = None
    """What chat templates know as `enable_thinking`; unset leaves it to the template."""
    reward: RewardConfig = RewardConfig(require_thinking=False, timeout_seconds=65.0)
    """How responses are graded. Thinking is cut off where there is some, and not required."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if (self.model.path is None) == (not self.endpoint.urls):
            raise ValueError("give model.path, a folder to sample from here, or endpoint.urls, where it is served")
        if self.long is not None and self.sampling.max_tokens not in (None, self.long):
            raise ValueError(f"long is {self.long}, sampling.max_tokens {self.sampling.max_tokens}: give one of them")
        if self.long is not None and self.model.path is None:
            raise ValueError(
                "long extends a model folder, and the model is behind an endpoint: `klear extend` its folder, serve "
                "that, and give sampling.max_tokens"
            )
        if self.endpoint.urls and not self.endpoint.model:
            raise ValueError("endpoint.model is not set: the name under which the servers know the model")
        names = [benchmark.name for benchmark in self.benchmarks]
        if not names:
            raise ValueError("benchmarks is empty: name at least one")
        for name in names:
            if not name or Path(name).name != name or name.startswith(".") or name == "long_model":
                raise ValueError(f"benchmarks holds the name {name!r}, which cannot be its folder's; choose another")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"benchmarks holds {', '.join(sorted(repeated))} twice; each has one folder")
        return self
