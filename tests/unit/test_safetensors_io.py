"""Weight folders: what is written reads back, damage is named, and nothing existing is touched by a failure."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_klear.models.safetensors_io import (
    SafetensorsError,
    SafetensorsFolder,
    SafetensorsWriter,
    TensorSpec,
    staged_folder,
    state_dtype,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    """All of `tensors` through the writer."""
    plan = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    with SafetensorsWriter(folder, plan, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    max_shard_bytes=st.integers(1, 300),
)
@settings(deadline=None, max_examples=40)
def test_written_tensors_read_back_bitwise(tmp_path_factory, shapes, dtype, max_shard_bytes) -> None:
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    write(folder, tensors, max_shard_bytes)
    read = SafetensorsFolder(folder)
    assert list(read.specs) == list(tensors)
    others: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        others |= load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(read.tensor(name), tensor)
        assert torch.equal(others[name], tensor)
        assert read.specs[name].dtype == dtype
    sizes = [sum(others[n].nbytes for n in load_file(p)) for p in folder.glob("*.safetensors")]
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert max(sizes) <= max(max_shard_bytes, largest)


def test_slices_are_those_of_the_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    write(tmp_path, {"t": tensor})
    part = SafetensorsFolder(tmp_path).sliced("t")
    assert torch.equal(part[2:5], tensor[2:5])
    assert torch.equal(part[:, 1:3], tensor[:, 1:3])
    assert part[6:6].shape == (0, 4)


@pytest.mark.parametrize("keep", [0, 7, 20, -1], ids=["empty", "no-length", "half-header", "last-byte"])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(SafetensorsError, match=r"model\.safetensors .*(truncated|damaged)"):
        SafetensorsFolder(tmp_path)


def test_damaged_header_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[9] = 0xFF
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(SafetensorsError, match=r"model\.safetensors has a damaged"):
        SafetensorsFolder(tmp_path)


def test_missing_shard_and_misplaced_tensor_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)}, max_shard_bytes=16)
    index = tmp_path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**listing["weight_map"], "c": listing["weight_map"]["a"]}}))
    with pytest.raises(SafetensorsError, match="does not hold c"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps(listing))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SafetensorsError, match=r"model-00002-of-00002\.safetensors is missing"):
        SafetensorsFolder(tmp_path)


def test_folder_without_safetensors_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SafetensorsError, match=r"pytorch_model\.bin"):
        SafetensorsFolder(tmp_path)


def test_writer_takes_the_plan_and_nothing_else(tmp_path: Path) -> None:
    plan = [TensorSpec(name=name, shape=(2,), dtype=torch.float32) for name in "ab"]
    with pytest.raises(SafetensorsError, match="b was not written"), SafetensorsWriter(tmp_path, plan) as writer:
        writer.write("a", torch.ones(2))
    with pytest.raises(SafetensorsError, match="expects a"), SafetensorsWriter(tmp_path, plan) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(SafetensorsError, match="GB free"):
        SafetensorsWriter(tmp_path, [TensorSpec(name="a", shape=(10**14,), dtype=torch.float32)])


def test_existing_folder_needs_force_and_survives_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(SafetensorsError, match="--force"), staged_folder(out):
        pytest.fail("must refuse before the block runs")

    def fail_half_way() -> None:
        with staged_folder(out, force=True) as staging:
            (staging / "new").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with staged_folder(out, force=True) as staging:
        (staging / "new").write_text("new")
        assert (out / "old").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out"]


def test_config_states_the_dtype_and_is_else_left_byte_for_byte(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"torch_dtype":   "float32"}')
    state_dtype(tmp_path, torch.float32)
    assert config.read_text() == '{"torch_dtype":   "float32"}'
    state_dtype(tmp_path, torch.bfloat16)
    assert json.loads(config.read_text()) == {"torch_dtype": "bfloat16"}
