"""Weights in a real vLLM server: they arrive in every update, and where they do not it is told before a rollout.

Faults are planted between the trainer and the server, in the client.
"""

import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_rl_run import TOML, start
from vllm_server import SHAPE, TIED_SHAPE, prompts, running_server

from megatron_klear.config.base import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SFTConfig,
)
from megatron_klear.config.checks_lora import adapter_sent
from megatron_klear.config.rl import SamplingConfig
from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.data.pack import num_predicted, pack
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture
from megatron_klear.orchestrator.trainer import TrainersWeights, send_weights
from megatron_klear.rl.losses import NLL
from megatron_klear.rollout.engine import GroupRequest
from megatron_klear.rollout.vllm import engine as vllm
from megatron_klear.rollout.vllm.client import ADAPTER_NAME, ServerClient
from megatron_klear.rollout.vllm.open import Access
from megatron_klear.train import weight_sync
from megatron_klear.train.weight_sync import WeightsNotArrived
from megatron_klear.types import Sample, VersionSpan
from megatron_klear.verify.rollouts import RolloutReport, verify_weights

pytestmark = pytest.mark.vllm

SAMPLING = SamplingConfig(samples_per_prompt=3, max_tokens=40, temperature=0.8)
# A fifth of the model: several buckets an update.
BUCKET_BYTES = 400_000


ANSWERS = {"swallowed": {"results": [None]}, "failed": {"success": False}}


class FaultyClient(ServerClient):
    """Does with one request after another what `fault` says, once it is set."""

    fault: str = ""
    folder: Path
    buckets = 0

    async def post(self, path: str, json: Any = None, params: Any = None, timeout_seconds: float = 300) -> Any:
        """The answer, of the server or made up."""
        json = await self._damaged(path, json)
        if isinstance(json, str):
            return ANSWERS[json]
        return await super().post(path, json, params, timeout_seconds)

    async def _damaged(self, path: str, json: Any) -> Any:
        method = json["method"] if path == "/collective_rpc" else path.removeprefix("/")
        match FaultyClient.fault, method:
            case "stale", "klear_begin_update":
                self.stale_version = str(int(json["args"][0]) - 1)
                return "swallowed"
            case "stale", "klear_checksums":
                return json | {"args": [self.stale_version]}
            case "stale", "start_weight_update" | "update_weights" | "finish_weight_update":
                return "swallowed"
            case "one element", "update_weights":
                _alter(Path(json["update_info"]["path"]))
            case "lost bucket", "update_weights":
                self.buckets += 1
                return "swallowed" if self.buckets == 2 else json
            case "stale head", "finish_weight_update":
                # What vLLM does by itself at the end of a reload, which leaves a tied head as it was.
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
                await super().post("/collective_rpc", body)
                await super().post("/update_weight_version", {"new_version": json["weight_version"]})
                return "swallowed"
            case "kept cache", "pause":
                return "swallowed"
            case "kept cache", "reset_prefix_cache":
                return "failed"
        return json


def _alter(file: Path) -> None:
    """Change one element of one norm by the least that can be."""
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if "model.layers.1.self_attn.q_norm.weight" in tensors:
        tensors["model.layers.1.self_attn.q_norm.weight"].view(torch.int32)[3] += 1
    save_file(tensors, file)


@dataclass
class Story:
    """What a run of updates came to."""

    differences: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    versions: list[set[int]] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    """What the same samples differ by after the trainer's next step."""
    told: str = ""
    left: list[str] = field(default_factory=list)


class Run:
    """Trainer and rollout engine of one process."""

    def __init__(
        self,
        model: Path,
        address: str,
        rollout: VLLMRolloutConfig,
        topology: Any,
        stop_token_ids=(3,),
        lora: LoraConfig | None = None,
    ) -> None:
        config = SFTConfig(
            output=model.parent / "run",
            model=ModelConfig(path=model, dtype="fp32"),
            optimizer=OptimizerConfig(learning_rate=3e-3 if lora is None else 3e-2, warmup_steps=0),
            lora=lora,
            data=DataConfig(train=("unused",)),
            checkpoint=CheckpointConfig(asynchronous=False),
        )
        self.engine = Engine(config, topology)
        self.trainer = weight_sync.ServersWeights(self.engine, rollout)
        self.trainer.connect(Access(addresses=(address,), api_key=None))
        self.rollouts = vllm.VLLMEngine(
            rollout,
            [address],
            TrainersWeights(self.trainer, needs_shared_device=False),
            decode=lambda ids: " ".join(map(str, ids)),
            stop_token_ids=stop_token_ids,
            vocab_size=self.engine.architecture.vocab_size,
            model=ADAPTER_NAME if lora is not None and lora.sync == "adapter" else None,
        )
        self.version = -1

    def send(self) -> float:
        """Send the weights as a new version; seconds it took."""
        self.version += 1
        start = time.perf_counter()
        send_weights(self.rollouts, self.trainer, self.version, self.engine.architecture.vocab_size)
        return time.perf_counter() - start

    def draw(self) -> list[Sample]:
        """Samples from the server."""
        groups = self.rollouts.generate(prompts(5, 40, 300), SAMPLING, seed=self.version)
        return [sample for group in groups for sample in group.samples]

    def difference(self, samples: list[Sample]) -> float:
        """Largest difference of the samples' log-probs to the trainer's."""
        batch = pack(samples, [1.0] * len(samples))
        own = self.engine.logprobs([batch], temperature=SAMPLING.temperature)[0]
        return float((own - batch.sampler_logprobs)[batch.weights != 0].abs().max())

    def train(self, samples: list[Sample]) -> None:
        """One step that changes every weight."""
        total = sum(num_predicted(sample) for sample in samples)
        self.engine.train_step([pack(samples, [1 / total] * len(samples))], NLL())

    def close(self) -> None:
        """End all."""
        self.rollouts.close()
        self.trainer.close()
        self.engine.close()


def update_and_compare(
    model: Path, address: str, rollout: VLLMRolloutConfig, updates: int, lora: LoraConfig | None = None
) -> Story:
    """Send, draw and compare, before and after each update."""
    story = Story()
    with world(ParallelConfig()) as topology:
        run = Run(model, address, rollout, topology, lora=lora)
        for _ in range(updates + 1):
            story.seconds.append(run.send())
            samples = run.draw()
            story.differences.append(run.difference(samples))
            story.versions.append({sample.policy_version for sample in samples})
            run.train(samples)
            story.changes.append(run.difference(samples))
        run.close()
    story.left = [str(path) for path in rollout.transfer_folder.iterdir()]
    return story


def plant(model: Path, address: str, rollout: VLLMRolloutConfig, faults: list[str]) -> dict[str, Story]:
    """For every fault: an update with it, what was told about it, and a good update after it."""
    stories = {}
    vllm.ServerClient = weight_sync.ServerClient = FaultyClient
    with world(ParallelConfig()) as topology:
        run = Run(model, address, rollout, topology)
        run.send()
        for fault in faults:
            stories[fault] = story = Story()
            run.train(run.draw())
            FaultyClient.folder = rollout.transfer_folder / fault
            hf_folder(run.engine, model, FaultyClient.folder)
            FaultyClient.fault = fault
            whole = run.engine.hf_weights
            if fault == "broken off":
                run.engine.hf_weights = lambda whole=whole: broken_off(whole())
            try:
                run.send()
                run.draw()
            except (WeightsNotArrived, vllm.WeightsNeeded, OSError) as error:
                story.told = str(error)
            FaultyClient.fault, run.engine.hf_weights = "", whole
            run.send()
            story.differences.append(run.difference(run.draw()))
        run.close()
    vllm.ServerClient = weight_sync.ServerClient = ServerClient
    return stories


def broken_off(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Some of the weights, of which a bucket or two are sent, in the middle of a layer."""
    yield from itertools.islice(weights, 10)
    raise OSError("the network is gone")


def send_under_way(
    model: Path, address: str, rollout: VLLMRolloutConfig, lora: LoraConfig | None = None
) -> tuple[int, list[tuple[list[int], float]]]:
    """New weights while responses are drawn: their version, the versions in each response, and the difference of the
    part drawn with the last of them.

    The moment is tried for several times: the server may be done before it, or not have begun.
    """
    with world(ParallelConfig()) as topology:
        run = Run(model, address, rollout, topology, stop_token_ids=(), lora=lora)
        run.send()
        for seconds in (0.1, 0.05, 0.2, 0.4, 0.8, 1.6):
            run.train(run.draw())
            found = [drawn_across(run, sample) for sample in interrupted(run, seconds)]
            if any(len(versions) > 1 for versions, _ in found):
                break
        run.close()
        return run.version, found


def interrupted(run: Run, seconds: float) -> list[Sample]:
    """Long responses, with new weights some seconds after they were asked for."""
    long = SAMPLING.model_copy(update={"max_tokens": 200, "stop_token_ids": ()})
    run.rollouts.submit([GroupRequest(prompt=prompt, sampling=long, seed=5) for prompt in prompts(5, 40, 300)])
    time.sleep(seconds)
    run.send()
    samples: list[Sample] = []
    while run.rollouts.in_flight:
        for finished in run.rollouts.take(60):
            samples += finished.group.samples
    return samples


def drawn_across(run: Run, sample: Sample) -> tuple[list[int], float]:
    """The versions that drew a sample, and how far the part of the last one lies from the trainer's log-probs."""
    batch = pack([sample], [1.0])
    own = run.engine.logprobs([batch], temperature=SAMPLING.temperature)[0]
    apart = ((own - batch.sampler_logprobs) * (batch.weights != 0)).abs()
    spans = sample.version_spans or (VersionSpan(sample.policy_version, 0, len(sample.tokens)),)
    # A row's entry is about the token after it.
    drawn_last = slice(max(spans[-1].start - 1, 0), spans[-1].end - 1)
    return [span.version for span in spans], float(apart[drawn_last].max())


def hf_folder(engine: Engine, model: Path, folder: Path) -> None:
    """The engine's weights as vLLM reads them from a disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file({name: tensor.clone() for name, tensor in engine.hf_weights()}, folder / "model.safetensors")


def settings_in(server: Any, folder: Path, transfer: str = "shared_memory") -> VLLMRolloutConfig:
    return server.config.model_copy(
        update={"transfer": transfer, "transfer_folder": folder, "bucket_bytes": BUCKET_BYTES, "request_seconds": 120.0}
    )


@pytest.mark.parametrize(
    ("server", "transfer"), [("tied_vllm_server", "shared_memory"), ("vllm_server", "disk")], ids=["tied", "untied"]
)
def test_the_server_samples_with_the_trainers_weights_before_and_after_every_update(
    server, transfer, ranks, tmp_path, request
):
    server = request.getfixturevalue(server)
    rollout = settings_in(server, tmp_path / "transfer", transfer)
    (story,) = ranks(1, update_and_compare, server.model, server.address, rollout, 5)
    print("milliseconds of each sync:", [round(1000 * seconds) for seconds in story.seconds])
    assert max(story.differences) < 1e-4
    assert min(story.changes) > 1e-2
    assert story.versions == [{version} for version in range(6)]
    assert story.left == []


@pytest.mark.skipif(
    os.environ.get("KLEAR_VLLM_EXPERTS") != "1", reason="with KLEAR_VLLM_EXPERTS=1, as it starts a server of its own"
)
def test_experts_arrive_in_every_update(ranks, tmp_path):
    shape = replace(SHAPE, expert_ffn_hidden_size=64, initializer_range=0.05)
    model = write_tiny_model(tmp_path / "model", "qwen3_moe", shape)
    with running_server(tmp_path, shape, model=model) as server:
        rollout = settings_in(server, tmp_path / "transfer")
        (story,) = ranks(1, update_and_compare, model, server.address, rollout, 2, timeout_seconds=300.0)
    assert max(story.differences) < 1e-4
    assert min(story.changes) > 1e-2
    assert story.versions == [{version} for version in range(3)]


def test_the_server_samples_with_adapters_merged_into_the_weights(tied_vllm_server, ranks, tmp_path):
    rollout, lora = settings_in(tied_vllm_server, tmp_path / "transfer"), LoraConfig(rank=8)
    (story,) = ranks(1, update_and_compare, tied_vllm_server.model, tied_vllm_server.address, rollout, 2, lora)
    assert max(story.differences) < 1e-4
    assert min(story.changes) > 1e-2


@pytest.mark.skipif(
    os.environ.get("KLEAR_VLLM_ADAPTERS") != "1", reason="with KLEAR_VLLM_ADAPTERS=1, as it starts a server of its own"
)
def test_adapters_alone_arrive_in_every_update_and_under_way(ranks, tmp_path):
    lora = LoraConfig(rank=12, alpha=24.0, sync="adapter")
    model = write_tiny_model(tmp_path / "model", "qwen3", TIED_SHAPE)
    form = adapter_sent(lora, read_architecture(model))
    with running_server(tmp_path, TIED_SHAPE, model=model, adapter=form) as server:
        rollout = settings_in(server, tmp_path / "transfer")
        arguments = server.model, server.address, rollout
        (story,) = ranks(1, update_and_compare, *arguments, 3, lora, timeout_seconds=300.0)
        ((version, found),) = ranks(1, send_under_way, *arguments, lora, timeout_seconds=300.0)
    assert max(story.differences) < 1e-4
    assert min(story.changes) > 1e-2
    assert story.versions == [{version} for version in range(4)]
    assert story.left == []
    assert any(versions == [version - 1, version] for versions, _ in found)
    assert all(difference < 1e-4 for versions, difference in found if versions[-1] == version)


FAULTS = {
    "stale": "tensors differ",
    "one element": r"1 tensors differ.*model\.layers\.1\.self_attn\.q_norm\.weight",
    "lost bucket": r"on one side only \(model\.",
    "kept cache": "no rollout server holds the present weights",
    "broken off": "the network is gone",
}


@pytest.mark.parametrize("server", ["tied_vllm_server", "vllm_server"], ids=["tied", "untied"])
def test_a_server_without_the_trainers_weights_is_found_out(server, ranks, tmp_path, request):
    server = request.getfixturevalue(server)
    faults = FAULTS | ({"stale head": "log-probs of the probe row differ"} if server.shape.tied_embeddings else {})
    (stories,) = ranks(1, plant, server.model, server.address, settings_in(server, tmp_path / "transfer"), list(faults))
    for fault, words in faults.items():
        assert re.search(words, stories[fault].told), f"{fault}: {stories[fault].told}"
        assert server.address in stories[fault].told or fault in ("kept cache", "broken off")
        assert max(stories[fault].differences) < 1e-4


def test_responses_under_way_go_on_with_the_new_weights(vllm_server, ranks, tmp_path):
    rollout = settings_in(vllm_server, tmp_path / "transfer")
    ((version, found),) = ranks(1, send_under_way, vllm_server.model, vllm_server.address, rollout)
    assert len(found) == 9
    assert any(versions == [version - 1, version] for versions, _ in found)
    assert all(difference < 1e-4 for versions, difference in found if versions[-1] == version)


def verified(toml: Path) -> RolloutReport:
    """What `tools/verify.py weights` finds."""
    return verify_weights(start(toml))


def test_verify_weights_works_with_servers(vllm_server, ranks, tmp_path):
    toml = tmp_path / "run.toml"
    stops = list(range(64))
    rollout = (
        f'[rollout]\nkind = "vllm"\nservers = ["{vllm_server.address}"]\ntransfer_folder = "{tmp_path}/transfer"\n'
    )
    toml.write_text(TOML.format(folder=vllm_server.model.parent, stops=stops) + rollout)
    (report,) = ranks(1, verified, toml)
    assert report.passed, report
    assert report.mean < 1e-4
    assert list((tmp_path / "transfer").iterdir()) == []
