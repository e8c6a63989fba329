"""What a folder of checkpoints says of itself, without Megatron."""

from pathlib import Path

import pytest

from megatron_klear.mcore.checkpoints import manifest


def write(folder: Path, step: int, content: bytes = b"weights") -> Path:
    """Publish a checkpoint of two files."""
    hidden = folder / ".saving-x"
    (hidden / "hf").mkdir(parents=True)
    (hidden / "__0_0.distcp").write_bytes(content)
    (hidden / "hf/config.json").write_text("{}")
    path = manifest.step_folder(folder, step)
    manifest.note_written(hidden, 0)
    manifest.publish(hidden, path, manifest.written(hidden, 0))
    return path


def test_a_published_checkpoint_is_whole(tmp_path: Path):
    path = write(tmp_path, 7)
    assert manifest.damage(path) == []
    assert manifest.steps(tmp_path) == [7]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: (path / "__0_0.distcp").write_bytes(b"weighty"), "does not have the hash"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"weig"), "has 4 bytes, the manifest says 7"),
        (lambda path: (path / "hf/config.json").unlink(), "is missing"),
        (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"files"'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm, told: str):
    path = write(tmp_path, 1)
    harm(path)
    (problem,) = manifest.damage(path)
    assert told in problem
    assert str(path) in problem


def test_each_writer_notes_its_own_files(tmp_path: Path):
    hidden = tmp_path / ".saving-x"
    hidden.mkdir()
    names = ["__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__10_0.distcp"]
    for name in names:
        (hidden / name).write_bytes(name.encode())
    (hidden / ".metadata").write_bytes(b"plan")
    manifest.note_written(hidden, 0)  # ranks 1 and 10 noted nothing: their writers ended too early
    shards = [manifest.written(hidden, rank) for rank in (0, 1, 10, 11)]
    assert [sorted(entries) for entries in shards] == [names[:2], [names[2]], [names[3]], []]
    path = manifest.step_folder(tmp_path, 1)
    manifest.publish(hidden, path, {name: entry for entries in shards for name, entry in entries.items()})
    assert sorted(file.name for file in path.iterdir()) == sorted([*names, ".metadata", "manifest.json"])
    assert manifest.damage(path) == []
    (path / ".metadata").write_bytes(b"plot")
    assert sum(len(manifest.damage(path, share, 3)) for share in range(3)) == 1


def test_what_a_writer_noted_is_not_read_again(tmp_path: Path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/__0_0.distcp").write_bytes(b"as written")
    manifest.note_written(tmp_path / "hidden", 0)
    (tmp_path / "hidden/__0_0.distcp").write_bytes(b"as damaged")
    manifest.publish(tmp_path / "hidden", tmp_path / "step-00000001", manifest.written(tmp_path / "hidden", 0))
    (problem,) = manifest.damage(tmp_path / "step-00000001")
    assert "does not have the hash" in problem


def test_a_step_published_twice_keeps_the_first_aside(tmp_path: Path):
    write(tmp_path, 4, b"first")
    path = write(tmp_path, 4, b"second")
    assert (path / "__0_0.distcp").read_bytes() == b"second"
    assert (tmp_path / "step-00000004.replaced-1/__0_0.distcp").read_bytes() == b"first"
    assert manifest.steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(1, 0, [6]), (2, 0, [5, 6]), (9, 0, [1, 2, 3, 4, 5, 6]), (1, 3, [3, 6])]
)
def test_retention(tmp_path: Path, keep: int, keep_every: int, left: list[int]):
    for step in range(1, 7):
        write(tmp_path, step)
    removed = manifest.retire(tmp_path, keep, keep_every)
    assert manifest.steps(tmp_path) == left
    assert sorted([*removed, *left]) == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob(".*"))


def test_sweeping_removes_the_unfinished_alone(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 1)
    for name in (".saving-step-00000002-77", ".removing-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    manifest.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000001.replaced-1"]
    manifest.sweep(tmp_path / "absent")


def test_what_is_no_checkpoint_is_named_with_the_remedy(tmp_path: Path):
    with pytest.raises(manifest.CheckpointError, match=r"is not a checkpoint of this project.*convert_hf_to_mcore"):
        manifest.read_training(tmp_path)
