"""Settings of a reinforcement-learning run, as strict as those of `config.py`, which these build on.

They are apart because a loss is its own table (`[loss] kind = "gppo"`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, create_model, model_validator

from megatron_klear.config.base import RunConfig, Settings
from megatron_klear.config.rollout import LocalRolloutConfig, Rollout
from megatron_klear.rewards.base import RewardSettings
from megatron_klear.rewards.code.settings import CodeSettings, too_short
from megatron_klear.rl.advantages import Advantage
from megatron_klear.rl.losses import GPPO, LOSSES, AnyLoss, resolve_loss
from megatron_klear.types import KLEstimator


def _table(loss: Any) -> type[Settings]:
    """`[loss]` for one loss: a strict table with the fields of its dataclass."""
    hints = typing.get_type_hints(loss)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(loss)
    }
    table: type[Settings] = create_model(f"{loss.__name__}Table", __base__=Settings, __doc__=loss.__doc__, **fields)
    globals()[table.__name__] = table  # found by name, so that settings travel to other processes
    return table


class CustomLoss(Settings):
    """`[loss] kind = "custom"`: a loss of your own; it runs in two phases, with one more matrix product."""

    kind: Literal["custom"] = "custom"
    path: str
    """Dotted path, `my_module:MyLoss`: a class or function called with (logprobs, old_logprobs, advantages)."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Given to the class."""


_TABLES = {loss: _table(loss) for loss in LOSSES.values()}
_LOSS_OF = {table: loss for loss, table in _TABLES.items()}
Loss: Any = Annotated[functools.reduce(operator.or_, _TABLES.values(), CustomLoss), Field(discriminator="kind")]


def build_loss(table: Settings) -> AnyLoss:
    """The loss that a `[loss]` table describes.

    Raises ValueError where its constants contradict each other or its path cannot be resolved.
    """
    if isinstance(table, CustomLoss):
        return resolve_loss(table.path, table.arguments)
    return _LOSS_OF[type(table)](**table.model_dump())


class PromptSource(Settings):
    """One source of problems: files, or a generator, never both."""

    files: tuple[str, ...] = ()
    """JSONL or Parquet files or globs of rows with `prompt`, `data_source` and `reward_model.ground_truth`."""
    generator: str | None = None
    """`arithmetic` (built in), or `reasoning_gym:TASK`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the generator."""
    count: PositiveInt = 1000
    """Problems that a generator makes for an epoch."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the others."""

    @model_validator(mode="after")
    def _check(self) -> PromptSource:
        if bool(self.files) == (self.generator is not None):
            raise ValueError("prompts.sources: give either files or generator")
        return self


class PromptsConfig(Settings):
    """`[prompts]`: the problems to roll out."""

    sources: tuple[PromptSource, ...] = Field(min_length=1)
    max_tokens: PositiveInt = 4096
    """Longer prompts are left out and counted."""
    thinking: bool | None = None
    """Passed to the chat template as `enable_thinking`; unset leaves it to the template."""
    chat_template: Path | None = None
    """A Jinja file to use instead of the tokenizer's own template."""


class SamplingConfig(Settings):
    """How responses are drawn."""

    samples_per_prompt: PositiveInt = 8
    max_tokens: PositiveInt = 32768
    """Longest response."""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends of a response besides the chat template's end of turn and the eos of tokenizer, generation_config.json and
    config.json."""


class CodeRewardConfig(Settings):
    """`[reward.code]`: how programs are run, judged and rewarded."""

    kind: Literal["soft", "hard", "released"] = "soft"
    """`soft`: the share of tests passed. `hard`: 1 where all are passed, else 0. `released`: 2p - 1 of at most 16
    tests, all or nothing where they are Python source, as the published code has it."""
    comparison: Literal["judge", "livecodebench", "tokens"] = "judge"
    """`judge`: lines of tokens, decimals within 1e-6, exact types of returned values. `livecodebench`: that benchmark's
    rules to the letter. `tokens`: as `judge`, wherever lines break."""
    sandbox: Literal["bubblewrap", "landlock", "remote"] = "bubblewrap"
    """`landlock` is the weaker one, for machines that forbid namespaces. `remote` is a service that speaks
    SandboxFusion's `run_code`."""
    url: str = ""
    """Of the remote sandbox, as `http://host:port`."""
    cpu_seconds: float = Field(default=6.0, gt=0)
    """Computing time of a program on one test; by the clock it has four times as much."""
    total_seconds: float = Field(default=60.0, gt=0)
    """Time of a program on all of its tests by the clock. `timeout_seconds` must be 5 s longer."""
    memory_gib: float = Field(default=1.0, gt=0)
    """Address space of a program."""
    max_tests: int = Field(default=0, ge=0)
    """Run at most so many tests of a problem, drawn by a seed of the program and the tests; 0 runs all (`released`:
    16)."""
    packages: tuple[str, ...] = ("sortedcontainers",)
    """Pure Python packages of this environment that programs may import besides the standard library; contest sites
    have the one that is the default."""

    @model_validator(mode="after")
    def _check(self) -> CodeRewardConfig:
        if (self.sandbox == "remote") != self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"reward.code.url {self.url!r} and reward.code.sandbox {self.sandbox!r} do not go together: a remote "
                "sandbox has an address that begins with http:// or https://, the others have none"
            )
        return self


class RewardConfig(Settings):
    """`[reward]`: how responses are judged."""

    scheme: Literal["paper", "released"] = "paper"
    """`paper`: +1 right and in format, -1 else. `released`: the values of the published code."""
    require_thinking: bool = True
    """Responses must think inside `<think>...</think>`, and only what follows is read as the answer."""
    timeout_seconds: float = Field(default=5.0, gt=0)
    """For one response; then its worker is killed and the sample counts as `timeout`."""
    workers: int = Field(default=0, ge=0)
    """Grading processes on a node; 0 is one per core (of those that Ray counts there, where it grades)."""
    backend: Literal["local", "ray"] = "local"
    """Where responses are graded: beside the first rank, or on the nodes of a Ray
    (`pip install "megatron-klear[ray]"`)."""
    ray_address: str = ""
    """Of a Ray to join and leave as it is: `host:port`, or `auto` for the one of this machine; empty is a Ray that the
    run starts and ends, on all of its nodes."""
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of a step's samples end as timeout or error."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that rewards of your own need: grading processes get those that Python and caches
    need (`rewards.pool.ENVIRONMENT`), and no token or key unless it is named here."""
    functions: dict[str, str] = Field(default_factory=dict)
    """Rewards by data_source: your own by dotted path, `"my_task" = "my_module:reward"`, or a built-in by its name,
    `"my/set" = "math"`."""
    code: CodeRewardConfig = CodeRewardConfig()

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        told = "code" in self.model_fields_set
        if told and (words := too_short(CodeSettings(**self.code.model_dump()), self.timeout_seconds)):
            raise ValueError(words)
        if self.ray_address and self.backend != "ray":
            raise ValueError(
                f'reward.ray_address {self.ray_address!r} is for reward.backend = "ray", which is {self.backend!r}'
            )
        if self.ray_address.startswith("ray://"):
            raise ValueError(
                f"reward.ray_address {self.ray_address!r} is of a Ray client: give host:port of the Ray itself, or auto"
            )
        return self

    def for_rewards(self) -> RewardSettings:
        """The part that rewards themselves read."""
        return RewardSettings(
            scheme=self.scheme,
            require_thinking=self.require_thinking,
            functions=self.functions,
            code=CodeSettings(**self.code.model_dump()),
        )


class OverlongPenalty(Settings):
    """`[algorithm.overlong_penalty]`: DAPO's soft penalty on responses close to the length cap."""

    buffer_tokens: PositiveInt = 4096
    """The penalty grows linearly over the last tokens before the cap."""
    factor: float = Field(default=1.0, gt=0)
    """Penalty at the cap."""


class AlgorithmConfig(Settings):
    """`[algorithm]`: from rewards to weights."""

    advantage: Advantage = "mean_std"
    """Estimator of advantages from rewards. Within a prompt's group: `mean_std` (GRPO), `mean` (Dr. GRPO), both leaving
    the sample itself out of the statistics (`mean_std_leave_one_out`, `rloo`), `opo` (baseline weighted by length),
    `pass_at_k` (of binary rewards). Over the whole step: `reinforce_plus_plus`, `reinforce_plus_plus_baseline`."""
    pass_k: int = Field(default=4, ge=1)
    """k of the advantage `pass_at_k`."""
    prompts_per_step: PositiveInt = 128
    """Prompts trained on in one rollout step."""
    generated_prompts: PositiveInt | None = None
    """Prompts generated at a time (the recipe: 256 for 128); unset is prompts_per_step."""
    max_generation_rounds: PositiveInt = 1
    """Rounds of generation until prompts_per_step informative groups are there; then the step takes what there is."""
    drop_zero_advantage: bool = True
    """Leave out groups whose rewards are all equal."""
    prompts_per_update: PositiveInt = 16
    """Prompts of one optimizer step (PPO mini-batch)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_mean_token_sum", "as_released"] = "token_mean"
    nll_coefficient: float = Field(default=0.1, ge=0)
    """alpha of the added NLL on correct responses (Eq. 13)."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL term to `reference`; 0 needs no reference."""
    kl_estimator: KLEstimator = "k3"
    """With d = ref - logp and r = exp(logp - old): `k3` has value exp(d) - d - 1 and slope 1 - exp(d) (GRPO); `k2` has
    d^2 / 2 and -d; `k3_unbiased` has k3 and -d (NeMo-RL's default); `k3_weighted` has r k3 and -r d (DeepSeek-V3.2). A
    value above 10 is 10, without gradient."""
    reference: Path | None = None
    """Hugging Face folder of the reference model; unset is the model the run starts from."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    overlong_filter: bool = False
    """Give responses cut at the length cap no weight."""
    overlong_penalty: OverlongPenalty | None = None
    old_logprobs: Literal["recompute", "sampler"] = "recompute"
    """Recomputed by the trainer at the start of a step, or taken from the sampler."""
    router_replay: Literal["none", "old", "sampler"] = "none"
    """Experts that tokens go through in every update, so that ratios speak of the same experts. `old`: those that they
    went through when their old log-probs were computed; needs `old_logprobs = "recompute"`. `sampler`: those that they
    went through when they were drawn, also where old log-probs are recomputed. For models with experts."""
    correction: Literal["none", "truncated", "masked"] = "truncated"
    """Correction of what another policy drew, by the ratio r of trainer to sampler: weights min(r, cap), or r within
    [1/cap, cap] and 0 outside."""
    correction_level: Literal["token", "sequence", "sequence_geometric"] = "token"
    """Whose ratio: each token's, the product over a response, or its geometric mean."""
    correction_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the ratio."""
    correction_floor: float | None = Field(default=None, gt=0)
    """Lower bound of what `masked` keeps; unset is 1 / correction_cap."""
    correction_sequence_bounds: tuple[float, float] | None = None
    """Responses whose geometric-mean ratio lies outside of these bounds are taken out as a whole, besides."""

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        if self.prompts_per_step % self.prompts_per_update:
            raise ValueError(
                f"algorithm.prompts_per_step {self.prompts_per_step} must be a multiple of "
                f"algorithm.prompts_per_update {self.prompts_per_update}"
            )
        if self.router_replay == "old" and self.old_logprobs != "recompute":
            raise ValueError(
                'algorithm.router_replay = "old" replays the experts of recomputed log-probs, and '
                'algorithm.old_logprobs is "sampler"; set it to "recompute", or router_replay to "none"'
            )
        floor = 1 / self.correction_cap if self.correction_floor is None else self.correction_floor
        if self.correction == "masked" and not floor < self.correction_cap:
            raise ValueError(
                f"algorithm.correction = masked keeps ratios from {floor:g} to algorithm.correction_cap "
                f"{self.correction_cap:g}, which is none: raise correction_cap, or set a smaller correction_floor"
            )
        bounds = self.correction_sequence_bounds
        if bounds is not None and not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"algorithm.correction_sequence_bounds {bounds} must be two numbers, the smaller first")
        return self


class ValidationConfig(Settings):
    """`[validation]`: avg@k on held-out problems; without sources there is none."""

    sources: tuple[PromptSource, ...] = ()
    every: int = Field(default=0, ge=0)
    """Rollout steps between validations; 0 only before the first and after the last."""
    sampling: SamplingConfig = SamplingConfig(samples_per_prompt=1, temperature=0.6, top_p=0.95)


class GPPOTrainConfig(Settings):
    """`[train]`: how long, and the form of micro-batches."""

    steps: PositiveInt = 100
    """Rollout steps; each is prompts_per_step / prompts_per_update optimizer steps."""
    tokens_per_microbatch: PositiveInt = 36864
    """Capacity of a packed row; a prompt with its response must fit."""
    segment_multiple: PositiveInt = 64
    """As in `[data]` of a supervised run."""
    max_skipped_steps: PositiveInt = 3
    """Stop after this many optimizer steps in a row with a non-finite loss or gradient."""
    keep_rollouts: bool = True
    """Keep every step's samples under `output/rollouts`, and those of validations under `output/validation`."""
    rollout_format: Literal["auto", "parquet", "jsonl"] = "auto"
    """Form of their files. `auto` is JSONL for a step of at most 250,000 response tokens, Parquet for a larger one."""
    keep_rollouts_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a step's groups whose samples are kept, evenly spaced over them; validations are kept whole."""
    keep_rollouts_steps: int = Field(default=0, ge=0)
    """Steps, and validations, whose samples are kept, the newest; 0 keeps all."""


class GPPOConfig(RunConfig):
    """GPPO and its relatives on verifiable problems: `train_gppo.py`."""

    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: Rollout = LocalRolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    loss: Loss = _TABLES[GPPO]()  # type: ignore[valid-type]
    validation: ValidationConfig = ValidationConfig()
    train: GPPOTrainConfig = GPPOTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> GPPOConfig:
        build_loss(self.loss)
        if self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError(
                f"sampling.top_p {self.sampling.top_p:g} and top_k {self.sampling.top_k} cut the sampler's "
                "distribution, while log-probs and ratios are over the whole vocabulary: every ratio would be too "
                "small by the share that was cut off; train with top_p 1 and top_k 0 (validation.sampling may have "
                "others)"
            )
        alone = {"mean", "mean_std", "reinforce_plus_plus"}
        if self.sampling.samples_per_prompt < 2 and self.algorithm.advantage not in alone:
            raise ValueError(
                f"algorithm.advantage {self.algorithm.advantage} compares the samples of a prompt: set "
                "sampling.samples_per_prompt to at least 2"
            )
        if self.algorithm.advantage == "pass_at_k" and self.algorithm.pass_k >= self.sampling.samples_per_prompt:
            raise ValueError(
                f"algorithm.pass_k {self.algorithm.pass_k} must be below sampling.samples_per_prompt "
                f"{self.sampling.samples_per_prompt}"
            )
        longest = self.prompts.max_tokens + self.sampling.max_tokens
        if longest > self.train.tokens_per_microbatch:
            raise ValueError(
                f"prompts.max_tokens {self.prompts.max_tokens} + sampling.max_tokens {self.sampling.max_tokens} is "
                f"above train.tokens_per_microbatch {self.train.tokens_per_microbatch}: a sample must fit in one row"
            )
        if self.train.segment_multiple % self.parallel.row_multiple:
            raise ValueError(
                f"train.segment_multiple {self.train.segment_multiple} must be a multiple of "
                f"{self.parallel.row_multiple} for tensor {self.parallel.tensor} and context {self.parallel.context} "
                "parallelism (a row is cut into 2 * context chunks and tensor shards)"
            )
        return self
