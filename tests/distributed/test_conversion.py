"""Hugging Face folder to checkpoint and back: bit for bit, in any layout, and nothing written on failure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pool import Pool
from safetensors.torch import load_file, save_file
from stories import write_stories_model

from megatron_klear.cli import convert_hf_to_mcore, convert_mcore_to_hf, inspect_checkpoint
from megatron_klear.config.base import ModelConfig, ParallelConfig, RunConfig
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.mcore import weights as hf
from megatron_klear.mcore.checkpoints import convert
from megatron_klear.mcore.checkpoints import save as checkpoint
from megatron_klear.mcore.checkpoints.convert import ConversionError
from megatron_klear.mcore.checkpoints.manifest import CheckpointError
from megatron_klear.mcore.model import build_chunks
from megatron_klear.mcore.topology import world
from megatron_klear.models.architecture import read_architecture

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2, sequence=False, device="cpu")
MODELS = [(family, tied) for family in ("qwen3", "qwen2", "llama") for tied in (True, False)]
MODELS.append(("qwen3_moe", False))
OTHER_LAYOUTS = {
    "one": ParallelConfig(device="cpu"),
    "pp4": ParallelConfig(pipeline=4, device="cpu"),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2, device="cpu"),
    "tp2-cp2": ParallelConfig(tensor=2, context=2, device="cpu"),
}
EP2 = ParallelConfig(expert=2, device="cpu")
EXPERT_LAYOUTS = {
    "one": ParallelConfig(device="cpu"),
    "tp2-ep4": ParallelConfig(tensor=2, expert=4, device="cpu"),
    "pp2-vpp2-ep2": ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2, device="cpu"),
}


def run_config(folder: Path, parallel: ParallelConfig, dtype: str = "fp32") -> RunConfig:
    """Settings of a model on the CPU."""
    return RunConfig(output=folder / "run", model=ModelConfig(path=folder, dtype=dtype), parallel=parallel)


def to_hf(source: Path, out: Path, max_shard_bytes: int = 100_000) -> convert.Verdict:
    """On one rank: the way back, in several files."""
    return convert.megatron_to_hf(source, out, max_shard_bytes=max_shard_bytes)


def weights_in_layout(path: Path, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """On every rank: load a checkpoint in a layout and export it."""
    run = run_config(path / "hf", parallel)
    with world(parallel) as topology:
        architecture = read_architecture(path / "hf")
        chunks = build_chunks(architecture, run, topology)
        checkpoint.load_weights(path, chunks, topology)
        return {name: tensor.clone() for name, tensor in hf.iter_hf_weights(chunks, architecture, topology)}


def padding_rows(path: Path, parallel: ParallelConfig) -> torch.Tensor:
    """On every rank: this rank's vocabulary rows beyond the vocabulary, after loading over parameters that were NaN."""
    with world(parallel) as topology:
        architecture = read_architecture(path / "hf")
        chunks = build_chunks(architecture, run_config(path / "hf", parallel), topology)
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        checkpoint.load_weights(path, chunks, topology)
        rows = torch.cat([chunks[0].embedding.word_embeddings.weight, chunks[-1].head_weight])
        start = len(rows) // 2 * topology.tensor.rank
        held = torch.arange(start, start + len(rows) // 2).repeat(2)
        return rows[held >= architecture.vocab_size].detach().clone()


def write_wrong_checkpoint(source: Path, out: Path, fault: str) -> None:
    """On one rank: convert with a fault between the weights and the files, or between the weights and the model."""
    if fault == "weights":
        save = checkpoint.save_weights

        def save_changed(path, models, topology, companions) -> None:
            with torch.no_grad():
                models[0].decoder.layers[1].mlp.linear_fc2.weight[0, 0] += 1e-7
            save(path, models, topology, companions)

        checkpoint.save_weights = save_changed
    else:
        frequencies = convert.inverse_frequencies
        convert.inverse_frequencies = lambda architecture: (1.5 * frequencies(architecture)[0], 1.0)
    convert.hf_to_megatron(source, out)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """True when names, dtypes and bits agree."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, read by the safetensors package alone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def round_trip(ranks: Pool, folder: Path, scratch: Path, parallel: ParallelConfig, dtype: str = "fp32") -> Path:
    """Through a checkpoint written in `parallel`, and back; the new folder."""
    run = run_config(folder, parallel, dtype)
    ranks(parallel.model_size, convert.write_checkpoint, run, scratch / "checkpoint", folder)
    ranks(1, to_hf, scratch / "checkpoint", scratch / "back")
    return scratch / "back"


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_round_trip_is_bitwise(tmp_path: Path, ranks: Pool, family: str, tied: bool) -> None:
    shape = TinyShape(tied_embeddings=tied, vocab_size=515, head_dim=16 if family == "qwen2" else 8)
    folder = write_tiny_model(tmp_path / "model", family, shape)
    back = round_trip(ranks, folder, tmp_path, TP2_PP2)
    assert same_tensors(read_all(folder), read_all(back))
    assert len(list(back.glob("*.safetensors"))) > 1
    kept = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert kept == {path.name for path in back.iterdir() if ".safetensors" not in path.name}
    for name in kept:
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name


def test_stories_260k_round_trip(tmp_path: Path, ranks: Pool, shared_data: Path) -> None:
    folder = write_stories_model(shared_data / "model_stories260K" / "stories260K.bin", tmp_path / "stories")
    back = round_trip(ranks, folder, tmp_path, ParallelConfig(tensor=4, sequence=False, device="cpu"))
    assert same_tensors(read_all(folder), read_all(back))


def test_bf16_round_trip(tmp_path: Path, ranks: Pool) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3")
    halves = {name: tensor.bfloat16() for name, tensor in read_all(folder).items()}
    save_file(halves, folder / "model.safetensors")
    back = round_trip(ranks, folder, tmp_path, TP2_PP2, "bf16")
    assert same_tensors(halves, read_all(back))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, ranks: Pool) -> tuple[Path, Path]:
    """A tied model, which has a second copy of its embedding on the last stage, and its TP2 PP2 checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    shape = TinyShape(tied_embeddings=True)
    model = write_tiny_model(folder / "model", "qwen3", shape)
    ranks(4, convert.write_checkpoint, run_config(model, TP2_PP2), folder / "checkpoint", model)
    return model, folder / "checkpoint"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, ranks: Pool) -> tuple[Path, Path]:
    """A model with experts, and its checkpoint written where they are shared out."""
    folder = tmp_path_factory.mktemp("experts")
    model = write_tiny_model(folder / "model", "qwen3_moe")
    ranks(2, convert.write_checkpoint, run_config(model, EP2), folder / "checkpoint", model)
    return model, folder / "checkpoint"


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_checkpoint_loads_in_any_layout(converted: tuple[Path, Path], ranks: Pool, layout: str) -> None:
    model, path = converted
    parallel = OTHER_LAYOUTS[layout]
    for weights in ranks(parallel.model_size, weights_in_layout, path, parallel):
        assert same_tensors(read_all(model), weights)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_qwen3_moe_loads_in_any_layout(experts: tuple[Path, Path], ranks: Pool, layout: str) -> None:
    model, path = experts
    parallel = EXPERT_LAYOUTS[layout]
    for weights in ranks(parallel.smallest_world, weights_in_layout, path, parallel):
        assert same_tensors(read_all(model), weights)


@pytest.mark.parametrize("written", [1, 2, 4])
def test_padding_rows_are_zero_after_resharding(tmp_path: Path, ranks: Pool, written: int) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama", TinyShape(vocab_size=513, num_kv_heads=4))
    parallel = ParallelConfig(tensor=written, sequence=False, device="cpu")
    ranks(written, convert.write_checkpoint, run_config(folder, parallel), tmp_path / "checkpoint", folder)
    for read, expected in ((1, 0), (2, 1), (4, 3)):
        rows = ranks(read, padding_rows, tmp_path / "checkpoint", ParallelConfig(tensor=read, device="cpu"))
        padding = torch.cat(rows)
        assert len(padding) == 2 * expected
        assert torch.equal(padding, torch.zeros_like(padding)), f"read by {read} ranks"


@pytest.mark.parametrize(
    ("fault", "message"), [("weights", "linear|down_proj|read back differently"), ("forward", "logits differ")]
)
def test_wrong_result_is_caught_and_not_published(tmp_path: Path, ranks: Pool, fault: str, message: str) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama", TinyShape(initializer_range=0.2))
    with pytest.raises(ConversionError, match=message):
        ranks(1, write_wrong_checkpoint, folder, tmp_path / "out", fault)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_checkpoint_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(converted[1], path)
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        convert.megatron_to_hf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/."""
    command = [sys.executable, "-W", "ignore", TOOLS / name, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


def test_tools_convert_there_and_back(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen2")
    there = tool("convert_hf_to_mcore.py", "--hf", folder, "--out", tmp_path / "mcore", "--tensor", 2)
    assert there.returncode == 0, there.stderr
    assert "tensors bitwise equal" in there.stdout
    assert "of transformers'" in there.stdout
    back = tool("convert_mcore_to_hf.py", "--mcore", tmp_path / "mcore", "--out", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert same_tensors(read_all(folder), read_all(tmp_path / "back"))


def test_tools_refuse_an_existing_folder(converted: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    model, path = converted
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    for main, source in (
        (convert_hf_to_mcore.main, ["--hf", str(model)]),
        (convert_mcore_to_hf.main, ["--mcore", str(path)]),
    ):
        assert main([*source, "--out", str(tmp_path / "out")]) == 1
        assert "--force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_inspection_counts_and_finds_damage(converted: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    model, path = converted
    expected = read_architecture(model).num_parameters
    for folder in (model, path):
        assert inspect_checkpoint.main([str(folder), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["parameters"] == expected
        assert report["problems"] == []
    shutil.copytree(path, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "training.json").write_text("{}")
    assert inspect_checkpoint.main([str(tmp_path / "checkpoint")]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert inspect_checkpoint.main([str(tmp_path)]) == 1
    assert "safetensors" in capsys.readouterr().err
