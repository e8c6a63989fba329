"""Time rollouts of ragged length: the local engine, a vLLM server and transformers, beside each other in one run.

    python tools/benchmark/rollouts.py                                   local and transformers
    python tools/benchmark/rollouts.py --vllm vllm-env/bin/python        and a vLLM server (tools/make_vllm_env.sh)
    python tools/benchmark/rollouts.py --vllm vllm-env/bin/python --device cuda --transfer cuda_ipc     one shared card

A Qwen3 of about 10 million random parameters draws responses whose lengths are geometric, since a few tokens of its
vocabulary end them. Engines take turns over the same prompts; tokens are those of responses, never padding, and each
engine's log-probs must first agree with the trainer's. Besides, the time of one weight sync to every engine, next to
that of saving and loading a whole checkpoint; on a card also its memory in use with the server awake and asleep. With
--device cuda it has not been run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_klear.cli.environment import enter_environment

enter_environment()

import numpy as np
import torch

from megatron_klear.config.rl import GPPOConfig, SamplingConfig
from megatron_klear.data.pack import pack
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.data.tokenizer import load_tokenizer
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.orchestrator.orchestrator import open_engine
from megatron_klear.orchestrator.trainer import send_weights
from megatron_klear.train.turn_end import stop_tokens_of
from megatron_klear.train.weight_sync import open_trainer
from megatron_klear.types import Prompt, Sample
from tools.benchmark.device import cpu_name

SHAPE = TinyShape(
    hidden_size=256, ffn_hidden_size=768, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=32, tied_embeddings=False
)
TOLERANCES = {"fp32": 1e-4, "bf16": 0.3}
"""Largest difference of a log-prob in nats between an engine and the trainer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is generated in one round."""

    prompts: int
    samples_per_prompt: int
    prompt_tokens: int
    mean_tokens: int
    """Mean of the geometric lengths, before the cap."""
    max_tokens: int
    rows: int
    """Sequences decoded at once."""
    device: Literal["cpu", "cuda"]
    transfer: Literal["shared_memory", "cuda_ipc"]

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """Precision of trainer and engines."""
        return "fp32" if self.device == "cpu" else "bf16"

    def sampling(self) -> SamplingConfig:
        """One token in `mean_tokens` of the vocabulary ends a response."""
        return SamplingConfig(
            samples_per_prompt=self.samples_per_prompt,
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(range(SHAPE.vocab_size // self.mean_tokens)),
        )


class Contender(Protocol):
    """Draws the responses of a round; returns how many tokens they have."""

    def __call__(self, prompts: Sequence[Prompt], seed: int) -> int:
        """Generate."""
        ...


@dataclass(kw_only=True, slots=True)
class Result:
    """What was measured of one engine."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sync_seconds: list[float] = field(default_factory=list)
    logprob_difference: float | None = None
    memory_gib: dict[str, float] = field(default_factory=dict)
    """Of the whole card in use, with the engine awake and asleep."""

    def speeds(self) -> list[float]:
        """Response tokens per second of every round."""
        return [count / seconds for count, seconds in zip(self.tokens, self.seconds, strict=True)]


class Rollouts:
    """A rollout engine of the project as a contender."""

    def __init__(self, config: GPPOConfig, trainer: Engine, load: Load) -> None:
        tokenizer = load_tokenizer(config.model.path, None)
        architecture, stop = trainer.architecture, stop_tokens_of(config.model.path, tokenizer)
        self.trainer = open_trainer(trainer, config, stop.ids)
        self.engine, access = open_engine(config, architecture, tokenizer, self.trainer)
        self.trainer.connect(access)
        self.sampling, self._vocab_size = load.sampling(), architecture.vocab_size

    def sync(self, version: int) -> None:
        """Give the trainer's weights to the engine, with proof."""
        send_weights(self.engine, self.trainer, version, self._vocab_size)

    def close(self) -> None:
        """End servers and connections."""
        self.engine.close()
        self.trainer.close()

    def __call__(self, prompts: Sequence[Prompt], seed: int) -> int:
        """Generate; groups that were dropped do not count."""
        return sum(int(sample.trained.sum()) for sample in self.samples(prompts, seed))

    def samples(self, prompts: Sequence[Prompt], seed: int) -> list[Sample]:
        """The samples themselves."""
        groups = self.engine.generate(prompts, self.sampling, seed)
        return [sample for group in groups for sample in group.samples]


class Transformers:
    """`generate` of transformers on batches padded on the left, with the log-prob of every token it drew."""

    def __init__(self, folder: Path, trainer: Engine, load: Load) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        dtype = torch.float32 if load.dtype == "fp32" else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(load.device).eval()
        state = dict(trainer.hf_weights())
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"transformers names other weights: {missing} missing, {unexpected} unexpected")
        self.load = load
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=load.max_tokens,
            eos_token_id=list(load.sampling().stop_token_ids),
            pad_token_id=SHAPE.vocab_size - 5,
            num_return_sequences=load.samples_per_prompt,
            return_dict_in_generate=True,
            output_logits=True,
        )

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Prompt], seed: int) -> int:
        """Generate in batches of at most `rows` sequences."""
        torch.manual_seed(seed)
        stops = torch.tensor(self.load.sampling().stop_token_ids, device=self.load.device)
        total, per_batch = 0, max(self.load.rows // self.load.samples_per_prompt, 1)
        for start in range(0, len(prompts), per_batch):
            part = prompts[start : start + per_batch]
            width = max(len(prompt.tokens) for prompt in part)
            tokens = torch.full((len(part), width), self.generation.pad_token_id)
            mask = torch.zeros(len(part), width, dtype=torch.int64)
            for row, prompt in enumerate(part):
                tokens[row, width - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens.astype(np.int64))
                mask[row, width - len(prompt.tokens) :] = 1
            tokens, mask = tokens.to(self.load.device), mask.to(self.load.device)
            out = self.model.generate(tokens, attention_mask=mask, generation_config=self.generation)
            drawn = out.sequences[:, width:]
            logits = torch.stack(out.logits, dim=1)
            logits.log_softmax(dim=-1).gather(-1, drawn[..., None])
            ended = torch.isin(drawn, stops)
            lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, drawn.shape[1])
            total += int(lengths.sum())
        return total


def settings(folder: Path, load: Load, vllm: Path | None) -> GPPOConfig:
    """A run of the project: with a server of the vLLM environment `vllm`, or in-process."""
    rollout: dict[str, Any] = {"kind": "local", "max_sequences": load.rows}
    if vllm is not None:
        server = {"python": vllm, "device": load.device, "max_sequences": load.rows, "kv_cache_gib": 0.5}
        rollout = {"kind": "vllm", "server": server, "transfer": load.transfer}
    return GPPOConfig.model_validate(
        {
            "output": folder / "run",
            "model": {"path": folder / "model", "weights": "random", "dtype": load.dtype},
            "parallel": {"device": load.device},
            "prompts": {"sources": [{"generator": "arithmetic"}], "max_tokens": load.prompt_tokens},
            "sampling": {"max_tokens": load.max_tokens},
            "rollout": rollout,
            "train": {"tokens_per_microbatch": load.prompt_tokens + load.max_tokens, "segment_multiple": 8},
        }
    )


def make_prompts(load: Load, seed: int) -> list[Prompt]:
    """Prompts of random tokens of ragged length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(load.prompt_tokens // 2, load.prompt_tokens + 1, size=load.prompts)
    return [
        Prompt(
            id=f"p{seed}-{index}",
            data_source="none",
            tokens=generator.integers(8, SHAPE.vocab_size, size=length).astype(np.int32),
            text="",
            ground_truth="",
        )
        for index, length in enumerate(lengths)
    ]


def largest_difference(trainer: Engine, samples: Sequence[Sample]) -> float:
    """Largest difference between the samples' log-probs and the trainer's."""
    batches = [pack([sample], [1.0]) for sample in samples]
    own = trainer.logprobs(batches)
    pairs = zip(own, batches, strict=True)
    found = [(values - batch.sampler_logprobs)[batch.weights != 0].abs().max() for values, batch in pairs]
    return float(torch.stack(found).max())


def time_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(load: Load, rounds: int, vllm: Path | None, folder: Path) -> dict[str, Any]:
    """All engines in turn."""
    write_tiny_model(folder / "model", "qwen3", SHAPE)
    config = settings(folder, load, None)
    with world(config.parallel) as topology:
        trainer = Engine(config, topology, total_steps=1, architecture=read_architecture(config.model.path))
        engines = {"local": Rollouts(config, trainer, load)}
        if vllm is not None:
            engines["vllm"] = Rollouts(settings(folder, load, vllm), trainer, load)
        try:
            return compare(load, rounds, trainer, engines, folder)
        finally:
            for contender in engines.values():
                contender.close()
            trainer.close()


def compare(load: Load, rounds: int, trainer: Engine, engines: dict[str, Rollouts], folder: Path) -> dict[str, Any]:
    """Check log-probs, warm up, then let engines take turns. Raises RuntimeError where log-probs differ."""
    results = {name: Result() for name in [*engines, "transformers"]}
    for name, contender in engines.items():
        for version in range(3):
            results[name].sync_seconds.append(
                time_of(lambda contender=contender, version=version: contender.sync(version))
            )
        difference = largest_difference(trainer, contender.samples(make_prompts(load, 0)[:2], 0))
        results[name].logprob_difference = difference
        if not difference < (limit := TOLERANCES[load.dtype]):
            raise RuntimeError(f"log-probs of {name} differ from the trainer's by {difference:.2e}, above {limit}")
        if load.device == "cuda":
            results[name].memory_gib = sleep_and_wake(contender)
    contenders: dict[str, Contender] = {**engines, "transformers": Transformers(folder / "model", trainer, load)}
    for number in range(rounds + 1):
        prompts = make_prompts(load, number + 1)
        for name, contender in contenders.items():
            start = time.perf_counter()
            tokens = contender(prompts, number)
            if number:  # the first round warms up
                results[name].seconds.append(time.perf_counter() - start)
                results[name].tokens.append(tokens)
    saved = time_of(lambda: (trainer.save(folder / "checkpoint"), trainer.finish_save()))
    loaded = time_of(lambda: trainer.load(folder / "checkpoint"))
    return summarise(results, saved, loaded)


def sleep_and_wake(contender: Rollouts) -> dict[str, float]:
    """Memory of the card in use with the engine awake, asleep, and awake again with weights."""

    def used() -> float:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return round((total - free) / 2**30, 3)

    memory = {"awake": used()}
    contender.engine.sleep()
    memory["asleep"] = used()
    contender.sync(3)
    return memory | {"awake_again": used()}


def summarise(results: dict[str, Result], saved: float, loaded: float) -> dict[str, Any]:
    """Medians, and each engine's speed over transformers' as the median over rounds."""
    base = results["transformers"].speeds()
    engines = {}
    for name, result in results.items():
        speeds = result.speeds()
        engines[name] = {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "speed_over_transformers": round(
                statistics.median(own / other for own, other in zip(speeds, base, strict=True)), 3
            ),
            "tokens": result.tokens,
            "largest_logprob_difference": result.logprob_difference,
            # the first sync meets caches that are not warm
            "sync_seconds": round(min(result.sync_seconds), 4) if result.sync_seconds else None,
            "memory_gib": result.memory_gib or None,
        }
    return {"engines": engines, "checkpoint_save_seconds": round(saved, 4), "checkpoint_load_seconds": round(loaded, 4)}


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = []
    for name, engine in summary["engines"].items():
        sync = "" if engine["sync_seconds"] is None else f"   sync {1e3 * engine['sync_seconds']:.0f} ms"
        speed, ratio = engine["tokens_per_second"], engine["speed_over_transformers"]
        lines.append(f"  {name:<13} {speed:>10,.1f} tokens/s   {ratio:.2f} times transformers{sync}")
    lines.append(
        f"  a whole checkpoint: saved in {1e3 * summary['checkpoint_save_seconds']:.0f} ms, loaded in "
        f"{1e3 * summary['checkpoint_load_seconds']:.0f} ms"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="python of a vLLM environment; without it vLLM is left out")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--mean-tokens", type=int, default=64, help="mean length of a response")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest response")
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--transfer", choices=["shared_memory", "cuda_ipc"], default="shared_memory")
    parser.add_argument("--out", type=Path, help="JSON file; default: results/rollouts_DEVICE.json beside this script")
    arguments = parser.parse_args(argv)
    load = Load(
        prompts=arguments.prompts,
        samples_per_prompt=arguments.samples,
        prompt_tokens=64,
        mean_tokens=arguments.mean_tokens,
        max_tokens=arguments.max_tokens,
        rows=arguments.rows,
        device=arguments.device,
        transfer=arguments.transfer,
    )
    with tempfile.TemporaryDirectory() as folder:
        summary = measure(load, arguments.rounds, arguments.vllm, Path(folder))
    print(table(summary))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "megatron-core")}
    report = {
        "benchmark": "rollouts",
        "device": torch.cuda.get_device_name() if load.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    report["load"] = {name: getattr(load, name) for name in load.__slots__}
    out = arguments.out or Path(__file__).parent / "results" / f"rollouts_{load.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report | summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
