"""Checkpoints: the same state in any layout, written at once or in the background, whole or not at all."""

import functools
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_run import SHAPE, write_run
from tiny_run import start as start_run

from megatron_klear.config.base import SFTConfig
from megatron_klear.data.pack import loss_weights, num_predicted, pack
from megatron_klear.mcore.checkpoints import manifest
from megatron_klear.mcore.checkpoints.background import filesystem_async
from megatron_klear.mcore.checkpoints.compare import compare_checkpoints
from megatron_klear.mcore.checkpoints.manifest import CheckpointError
from megatron_klear.mcore.engine import Engine
from megatron_klear.mcore.topology import world
from megatron_klear.rl.losses import NLL
from megatron_klear.runs.leave import Leaving
from megatron_klear.verify.layouts import Layout, layouts_named, ragged_samples

WRITTEN_IN = "TP2 PP2 SP"
BALLAST = 128 << 20
READ_IN = ["one process", "TP2", "PP2", "PP2 VPP2", "CP2", "DP2 overlap", "PP2 VPP2 DP2 overlap"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SFTConfig:
    config = start_run(write_run(tmp_path_factory.mktemp("model"))).config
    checkpoint = config.checkpoint.model_copy(update={"asynchronous": False})
    return config.model_copy(update={"checkpoint": checkpoint})


def asynchronously(config: SFTConfig, on: bool) -> SFTConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": on})})


def rows(engine: Engine):
    """The rows of this data rank; each step trains on the same."""
    samples = ragged_samples(SHAPE.vocab_size, longest=32, count=8)
    weights = loss_weights(_counts(samples), "token_mean")
    batches = [
        pack(samples[i : i + 2], [float(weight) for weight in weights[i : i + 2]]) for i in range(0, len(samples), 2)
    ]
    return batches[engine.topology.data.rank :: engine.topology.data.size]


def _counts(samples):
    return np.array([num_predicted(sample) for sample in samples])


def save_after_training(config: SFTConfig, layout: Layout, path: Path, steps: int) -> None:
    laid_out = layout.lay_out(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        for _ in range(steps):
            engine.train_step(rows(engine), NLL())
        engine.save(path, {"data": {"epoch": 3}})
        engine.close()


def load_and_save_again(config: SFTConfig, layout: Layout, source: Path, target: Path) -> float:
    """Also takes a step, after the save; returns its loss."""
    laid_out = layout.apply(config)
    with world(laid_out.parallel, laid_out.seed) as topology:
        engine = Engine(laid_out, topology)
        extra = engine.load(source)
        assert engine.step == 2
        engine.save(target, extra)
        loss = engine.train_step(rows(engine), NLL()).loss
        engine.close()
        return loss


@pytest.fixture(scope="module")
def written(config, ranks, tmp_path_factory) -> tuple[Path, float]:
    """A checkpoint of two steps, and the loss of the third."""
    folder = tmp_path_factory.mktemp("written")
    layout = layouts_named([WRITTEN_IN])[0]
    ranks(4, save_after_training, config, layout, folder / "step-00000002", 2)
    loss = ranks(4, load_and_save_again, config, layout, folder / "step-00000002", folder / "again")[0]
    return folder / "step-00000002", loss


@pytest.mark.parametrize("name", READ_IN)
def test_weights_and_optimizer_survive_a_change_of_layout_exactly(config, written, ranks, tmp_path, name: str):
    path, expected_loss = written
    layout = layouts_named([name])[0]
    loss = ranks(layout.processes, load_and_save_again, config, layout, path, tmp_path / "again")[0]
    found = compare_checkpoints(path, tmp_path / "again")
    assert found.unequal_tensors == []
    assert found.num_optimizer_tensors == 3 * (found.num_tensors - found.num_optimizer_tensors)
    assert [place for place in found.unequal_state if "rng" not in place] == []
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_generators_are_restored_in_the_same_layout(config, written, ranks, tmp_path):
    layout = layouts_named([WRITTEN_IN])[0]
    ranks(4, load_and_save_again, config, layout, written[0], tmp_path / "again")
    assert compare_checkpoints(written[0], tmp_path / "again").bitwise_equal


def test_the_comparison_sees_one_step_more(config, written, ranks, tmp_path):
    ranks(1, save_after_training, config, layouts_named(["one process"])[0], tmp_path / "more", 3)
    found = compare_checkpoints(written[0], tmp_path / "more")
    assert "decoder.final_layernorm.weight" in found.unequal_tensors
    assert found.largest > 1e-4
    assert any("training.json step" in place for place in found.unequal_state)
    assert any("param_groups" in place for place in found.unequal_state)


def save_both_ways(config: SFTConfig, folder: Path, layout: Layout) -> None:
    """In the background first, and train on while it is written; then at once, from a replay of the same steps."""
    for name, background, more in (("background", True, 2), ("at-once", False, 0)):
        laid_out = asynchronously(layout.lay_out(config), background)
        with world(laid_out.parallel, laid_out.seed) as topology:
            engine = Engine(laid_out, topology)
            engine.train_step(rows(engine), NLL())
            engine.save(folder / name)
            for _ in range(more):
                engine.train_step(rows(engine), NLL())
            engine.close()


@pytest.mark.parametrize("name", ["one process", "DP2 overlap"])
def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(config, ranks, tmp_path, name: str):
    layout = layouts_named([name])[0]
    ranks(layout.processes, save_both_ways, config, tmp_path, layout)
    assert compare_checkpoints(tmp_path / "background", tmp_path / "at-once").bitwise_equal
    for path in (tmp_path / "background", tmp_path / "at-once"):
        assert manifest.damage(path) == []


def save_once_ready(config: SFTConfig, folder: Path) -> None:
    """Save where the caller is ready, and where it never is; what it sees when it is asked."""
    first, second, third = (folder / f"step-{step:08d}" for step in (1, 2, 3))

    def asked_before_it_is_there() -> None:
        assert not first.exists()
        assert list(folder.glob(".saving-step-00000001-*/.metadata"))
        (folder / f"asked-{topology.rank}").touch()
        topology.barrier()

    def never() -> None:
        raise OSError("no room for samples")

    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        engine.save(first, ready=asked_before_it_is_there)
        engine.finish_save()
        assert first.is_dir()
        assert (folder / f"asked-{topology.rank}").is_file()
        with pytest.raises(OSError, match="no room for samples"):
            _save_to_the_end(engine, second, ready=never)
        topology.barrier()
        assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == [first.name]
        engine.save(third)
        engine.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_appears_when_its_caller_is_ready(config, ranks, tmp_path, background: bool):
    ranks(2, save_once_ready, asynchronously(config, background), tmp_path)
    assert manifest.steps(tmp_path) == [1, 3]
    assert [manifest.damage(manifest.step_folder(tmp_path, step)) for step in (1, 3)] == [[], []]


def _save_to_the_end(engine: Engine, path: Path, **how) -> None:
    engine.save(path, **how)
    engine.finish_save()


def what_children_keep(config: SFTConfig, folder: Path) -> int:
    """Bytes that this process's children have for themselves once all that it holds is written anew after a save."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        held = np.ones(BALLAST, dtype=np.uint8)
        engine.save(folder / "step-00000001")
        engine.finish_save()
        held += 1
        own = Path("/proc/self/task")
        children = [int(child) for task in own.iterdir() for child in (task / "children").read_text().split()]
        assert children, "who keeps the results of writing?"
        rollups = [Path(f"/proc/{child}/smaps_rollup").read_text() for child in children]
        engine.close()
        return max(1024 * int(re.search(r"Private_Dirty:\s+(\d+)", rollup).group(1)) for rollup in rollups)


@pytest.mark.parametrize("background", [True, False])
def test_no_process_keeps_an_old_copy_of_what_is_trained(config, ranks, tmp_path, background: bool):
    (kept,) = ranks(1, what_children_keep, asynchronously(config, background), tmp_path)
    assert kept < BALLAST / 4


def signalled_while_writing(config: SFTConfig, folder: Path, number: int) -> None:
    """A rank's process group is told to stop while a tensor is being written; the rank itself takes it."""
    write, rank = filesystem_async._write_item, os.getpid()

    @functools.wraps(write)  # its parameters are looked up
    def told_to_stop(*args, **kwargs):
        assert os.getpid() != rank, "it is written in the background"
        for writer in {os.getpid(), os.getppid()} - {rank}:  # and who waits for those that write
            os.kill(writer, number)
        return write(*args, **kwargs)

    filesystem_async._write_item = told_to_stop
    with world(config.parallel, config.seed) as topology, Leaving(topology):
        engine = Engine(config, topology)
        engine.save(folder / "step-00000001")
        engine.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_of_a_rank_leaves_the_save_whole(config, ranks, tmp_path, number: int):
    ranks(1, signalled_while_writing, asynchronously(config, True), tmp_path, number)
    assert manifest.damage(manifest.step_folder(tmp_path, 1)) == []


def run_out_of_space(config: SFTConfig, folder: Path) -> str:
    """Save once, then again where no file may grow; then go on from the first."""
    with world(config.parallel, config.seed) as topology:
        engine = Engine(config, topology)
        engine.save(folder / "step-00000001")
        engine.finish_save()
        engine.train_step(rows(engine), NLL())
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            with pytest.raises(CheckpointError) as caught:
                _save_to_the_end(engine, folder / "step-00000002")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        engine.load(folder / "step-00000001")
        engine.save(folder / "step-00000003")
        engine.close()
        return str(caught.value)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint(config, ranks, tmp_path, background: bool, processes: int):
    messages = ranks(processes, run_out_of_space, asynchronously(config, background), tmp_path)
    for told in messages:
        assert f"checkpoint {tmp_path / 'step-00000002'} could not be written" in told
        assert "free space" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert manifest.damage(tmp_path / "step-00000001") == []
    assert compare_checkpoints(tmp_path / "step-00000001", tmp_path / "step-00000003").bitwise_equal


def load_wrong(config: SFTConfig, path: Path) -> None:
    with world(config.parallel, config.seed) as topology:
        Engine(config, topology).load(path)


@pytest.mark.parametrize("damage", ["no training.json", "weights alone", "cut short", "no metadata"])
def test_what_cannot_be_loaded_is_named(config, written, ranks, tmp_path, damage: str):
    path = tmp_path / "step-00000002"
    shutil.copytree(written[0], path)
    if damage == "no training.json":
        (path / "training.json").unlink()
    elif damage == "weights alone":
        training = json.loads((path / "training.json").read_text())
        (path / "training.json").write_text(json.dumps(training | {"has_optimizer": False}))
    elif damage == "cut short":
        for file in path.glob("*.distcp"):
            file.write_bytes(file.read_bytes()[:1000])
    else:
        (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=str(path)):
        ranks(1, load_wrong, config, path)
