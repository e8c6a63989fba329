"""Every setting there is, typed, documented under its field, and strict: an unknown key is an error.

A run is one TOML file plus dotted command-line overrides (`--optimizer.learning_rate 2e-6`); `read.py` reads them.
Only what can be judged from the settings alone is checked here; what needs the model's shape or the world size is
checked by `mcore.topology` and `plan` before any weight is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Settings(BaseModel):
    """Base of every table: frozen, strict about keys, described by the docstring under each field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


FP8_TOKENS = {"blockwise": 128, "tensorwise": 16}
"""By recipe, what the tokens of a tensor must divide by: cuBLAS takes FP8 products of multiples of 16, and
transformer-engine gathers block-scaled tensors over sequence shards in whole blocks."""


class ModelConfig(Settings):
    """`[model]`: which weights, at which precision."""

    path: Path
    """Hugging Face model folder: config.json, tokenizer files, and safetensors weights unless `weights = "random"`."""
    checkpoint: Path | None = None
    """Start from the weights of this Megatron checkpoint instead of the safetensors (optimizer state is not read)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises from `seed` and reads only config.json and the tokenizer."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations. bf16 keeps fp32 master weights and fp32 gradients."""
    attention: Literal["auto", "sdpa", "varlen", "flash"] = "auto"
    """Packed attention: `auto` takes FlashAttention or torch's varlen kernel on CUDA, SDPA per segment elsewhere."""
    transformer_engine: Literal["auto", "on", "off"] = "auto"
    """transformer-engine's linear and norm layers: `auto` uses them when importable and a GPU is present."""
    fp8: Literal["off", "e4m3", "hybrid"] = "off"
    """FP8 matrix products through transformer-engine; needs it and a Hopper GPU or newer."""
    fp8_recipe: Literal["blockwise", "tensorwise", "delayed"] = "blockwise"
    """What one FP8 scale is of: `blockwise` 128 values of a token (128 x 128 of a weight), `tensorwise` all of a row's
    tensor. `delayed`, from the largest values of earlier passes, is refused: log-probs must be the weights' alone."""
    fused_loss: bool = True
    """The fused loss kernel (hidden states to gradients). Off computes logits and differentiates them, to debug."""
    logits_dtype: Literal["fp32", "model"] = "fp32"
    """Precision in which logits leave the matrix product; `model` is faster and rounds them."""
    moe_aux_loss: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss of models with experts: of each layer, over every sequence by itself (1 where
    its experts are equally liked). 0 as reinforcement learning wants it; pre-training takes 1e-3."""
    moe_z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-sum-exp of router logits (ST-MoE), the mean over each sequence's tokens."""
    compare_logits: Literal["auto", "on", "off"] = "auto"
    """Before the first step of a pretrained model, compare a short row's log-probs with transformers' on the same
    folder and stop where they differ: rank 0 loads the model once more, in fp32, into host memory. `auto` does so up
    to 2 billion parameters where memory allows, and says so where it does not."""

    @property
    def shard_multiple(self) -> int:
        """What each rank's share of a padded row must divide by: the tokens that FP8 products come in, else 1."""
        return 1 if self.fp8 == "off" else FP8_TOKENS.get(self.fp8_recipe, 1)


class ParallelConfig(Settings):
    """`[parallel]`: how the model is laid over processes. Data parallelism is what is left of the world."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks a pipeline rank holds (interleaved schedule); 1 is the plain 1F1B schedule."""
    context: PositiveInt = 1
    expert: PositiveInt = 1
    """Processes that share out a layer's experts. They are those of the tensor, context and data axes together."""
    expert_tensor: PositiveInt | None = None
    """Tensor parallelism within an expert. Unset: that of the model where `expert` is 1, else none."""
    sequence: bool = True
    """Sequence parallelism of norms and residuals; takes effect where `tensor` is above 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cpu` runs the same Megatron code over gloo. `auto` is cuda where there is one."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """How long a collective may wait for a rank before the run stops."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline > 1 needs parallel.pipeline > 1")
        return self

    @property
    def model_size(self) -> int:
        """Processes that one model replica takes."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallelism within an expert."""
        return self.expert_tensor or (self.tensor if self.expert == 1 else 1)

    @property
    def smallest_world(self) -> int:
        """The fewest processes that hold both the replicas of the model and those of its experts."""
        return math.lcm(self.model_size, self.pipeline * self.expert * self.expert_tensor_size)

    @property
    def segment_multiple(self) -> int:
        """What the length of every padded segment must divide by: two zig-zag chunks per context rank."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def row_multiple(self) -> int:
        """What the length of a padded row must divide by, for the context slices and their sequence-parallel shards."""
        shards = self.tensor if self.sequence else 1
        return math.lcm(self.segment_multiple, self.context * shards)


class OptimizerConfig(Settings):
    """`[optimizer]`: AdamW and its learning-rate schedule."""

    learning_rate: float = Field(default=8e-5, ge=0)
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Where the decay ends, after the last step: the last one still moves the weights."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear from zero; the first step already has learning_rate / warmup_steps."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.1, ge=0)
    """Not applied to biases and norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with computation, where data parallelism is above 1."""
    cpu_offload: float = Field(default=0.0, ge=0, le=1)
    """Share of the optimizer state held and stepped in host memory, 16 bytes a parameter there; GPUs and bf16 only."""
    implementation: Literal["auto", "torch", "fused"] = "auto"
    """`fused` is Apex's or transformer-engine's Adam, an error where neither imports; `auto` prefers it."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}"
            )
        return self


LoraTarget = Literal["all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Settings):
    """`[lora]`: train low-rank adapters of the model's matrices (arXiv 2106.09685) and leave its weights as they are.

    Without the table all weights are trained.
    """

    rank: PositiveInt = 32
    """Rows of A and columns of B in W + (alpha / rank) B A."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank, so that a learning rate serves several ranks."""
    targets: tuple[LoraTarget, ...] = Field(default=("all",), min_length=1)
    """Matrices with an adapter, in every layer, by their Hugging Face names. Embedding and head never have one."""
    adapter: Path | None = None
    """Start from this adapter, a folder that PEFT or an export wrote, instead of from an update of zero. It must have
    this rank, alpha and targets."""
    sync: Literal["merged", "adapter"] = "merged"
    """What samplers are sent in reinforcement learning: weights with the adapters merged in, or the adapters alone, to
    vLLM servers that read the base from `model.path`."""

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if "all" in self.targets and len(self.targets) > 1:
            raise ValueError(f"lora.targets {list(self.targets)}: all has the others in it; give it alone")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets {list(self.targets)} names a matrix twice")
        return self


RecomputedModule = Literal["core_attn", "mlp", "layernorm"]


class RecomputeConfig(Settings):
    """`[recompute]`: activations recomputed in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes parts of every layer, `full` whole layers."""
    modules: tuple[RecomputedModule, ...] = ("core_attn", "mlp")
    """With `selective`: the parts. `core_attn` is the attention between its matrices, `mlp` the MLP or the experts with
    what comes before them, `layernorm` the norms' outputs."""
    method: Literal["uniform", "block"] = "uniform"
    """With `full`: `uniform` recomputes all layers, `layers` at a time; `block` the first `layers` of every pipeline
    stage (of each of its chunks under `parallel.virtual_pipeline`) one at a time, and keeps the others'
    activations."""
    layers: PositiveInt = 1
    """With `full`: layers of a recomputed block, or those of a stage that are recomputed; see `method`."""

    @model_validator(mode="after")
    def _check(self) -> RecomputeConfig:
        if self.granularity == "selective" and not self.modules:
            raise ValueError('recompute.modules names none; set recompute.granularity to "none" to recompute nothing')
        if len(set(self.modules)) < len(self.modules):
            raise ValueError(f"recompute.modules {list(self.modules)} names a part twice")
        given = self.model_fields_set
        if self.granularity != "selective" and "modules" in given and self.modules != ("core_attn", "mlp"):
            raise ValueError(f'recompute.modules are for granularity = "selective", which is "{self.granularity}"')
        if self.granularity != "full" and self.method == "block":
            raise ValueError(f'recompute.method = "block" is for granularity = "full", which is "{self.granularity}"')
        return self

    def repeats(self, module: RecomputedModule) -> bool:
        """Whether a part is recomputed in the layers that are."""
        return self.granularity == "full" or (self.granularity == "selective" and module in self.modules)


class OffloadConfig(Settings):
    """`[offload]`: activations that wait in host memory for the backward pass."""

    activations: bool = False
    """Copy what layers keep, or what recomputation leaves of it, to pinned host memory while the pass goes on."""
    smallest_bytes: PositiveInt = 1 << 20
    """Tensors of fewer bytes stay on the card."""
    window: PositiveInt = 4
    """Tensors that stay on the card until later ones have been saved: their copies are under way meanwhile, and the
    last of a row are the first that its backward pass wants."""


class DataConfig(Settings):
    """`[data]`: supervised rows and how they are tokenised and packed."""

    train: tuple[str, ...] = Field(min_length=1)
    """JSONL or Parquet files or globs of rows with `messages`, or with `prompt` and `response`."""
    validation: tuple[str, ...] = ()
    """Held-out rows of the same form. Empty: `validation_share` is split off `train`."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows held out, chosen by a hash of the row: the same rows whatever their order."""
    chat_template: Path | None = None
    """A Jinja file to use instead of the tokenizer's own template."""
    trained_turns: Literal["all", "last"] = "all"
    """Which assistant turns the loss reads."""
    max_length: PositiveInt = 32768
    """Longest sample, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of longer ones. Always counted and logged."""
    cache: Path = Path(".cache/tokens")
    """Where tokenised data is kept, keyed by a hash of data, tokenizer, template and these settings."""
    workers: int = Field(default=0, ge=0)
    """Tokenising processes; 0 is one per core."""
    tokens_per_microbatch: PositiveInt = 32768
    """Capacity of a packed row, a strict cap."""
    packing: bool = True
    """False puts one sequence in a row."""
    segment_multiple: PositiveInt = 64
    """A sequence takes a multiple of this many tokens when rows are planned, so that one plan serves every
    layout whose context and tensor parallelism divide it."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.tokens_per_microbatch % self.segment_multiple:
            raise ValueError(
                f"data.tokens_per_microbatch {self.tokens_per_microbatch} must be a multiple of "
                f"data.segment_multiple {self.segment_multiple}"
            )
        if self.max_length > self.tokens_per_microbatch:
            raise ValueError(
                f"data.max_length {self.max_length} is above data.tokens_per_microbatch {self.tokens_per_microbatch}: "
                "a sample must fit in one row"
            )
        if self.validation and self.validation_share:
            raise ValueError("data.validation and data.validation_share exclude each other; keep one")
        return self


class TrainConfig(Settings):
    """`[train]`: how long, and what a step is."""

    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps; unset runs all `epochs`."""
    rows_per_step: PositiveInt = 8
    """Packed rows in one optimizer step, over all data-parallel ranks: each rank runs rows_per_step / ranks
    micro-batches. The same rows make the same step in every layout."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """The step's loss: mean over all its trained tokens, or over its sequences of each one's token mean."""
    validate_every: int = Field(default=0, ge=0)
    """Steps between validation losses; 0 never."""
    max_skipped_steps: PositiveInt = 3
    """Stop after this many steps in a row with a non-finite loss or gradient; each one is skipped and dumped."""


class CheckpointConfig(Settings):
    """`[checkpoint]`: when to save, what to keep."""

    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only the last step."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; older ones are removed once a newer one is complete."""
    keep_every: int = Field(default=0, ge=0)
    """Steps that are a multiple of this are never removed; 0 for none."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    export_hf: bool = False
    """Also write the final weights as a Hugging Face folder, `output/hf`; adapters are merged, and in `output/adapter`
    as PEFT reads them."""


class LoggingConfig(Settings):
    """`[logging]`: what is written beside metrics.jsonl, which always is."""

    tensorboard: bool = True
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in the training precision, for MFU; unset uses the table of known GPUs."""


class RunConfig(Settings):
    """What every kind of run has."""

    output: Path
    """Folder of the run: metrics, resolved configuration, checkpoints. An existing run in it is resumed."""
    seed: int = Field(default=1234, ge=0)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    recompute: RecomputeConfig = RecomputeConfig()
    offload: OffloadConfig = OffloadConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def row_multiple(self) -> int:
        """What the length of a padded row must divide by, for the layout and for FP8 products of every shard of it."""
        shards = self.parallel.context * (self.parallel.tensor if self.parallel.sequence else 1)
        return math.lcm(self.parallel.row_multiple, shards * self.model.shard_multiple)


class SFTConfig(RunConfig):
    """Supervised fine-tuning on long chains of thought, packed: `pretrain_sft.py`."""

    data: DataConfig
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        if self.data.segment_multiple % self.parallel.row_multiple:
            raise ValueError(
                f"data.segment_multiple {self.data.segment_multiple} must be a multiple of "
                f"{self.parallel.row_multiple} for tensor {self.parallel.tensor} and context {self.parallel.context} "
                "parallelism (a row is cut into 2 * context chunks and tensor shards)"
            )
        return self
