"""Plans of the recipes on a machine that has neither their models nor their data."""

from pathlib import Path

import pytest

from megatron_klear.config.start import start_gppo, start_sft
from megatron_klear.data.tiny import write_tiny_model
from megatron_klear.models.architecture import ArchitectureError
from megatron_klear.models.shapes import SHAPES, planned_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Published parameter counts: Qwen3's model cards (8.2 B, 6.95 B without embeddings; 30.5 B, 3.3 B of them met by a
# token), SmolLM2's (134.5 M).
PARAMETERS = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-8B-Base": 8_190_735_360,
    "SmolLM2-135M-Instruct": 134_515_008,
}


def test_every_shipped_shape_has_the_published_number_of_parameters():
    assert {path.stem for path in SHAPES.glob("*.json")} == PARAMETERS.keys()
    for name, parameters in PARAMETERS.items():
        assert planned_model(Path("models") / name).architecture.num_parameters == parameters


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Qwen3-8B-Base", "Qwen3-8B-Base"),
        ("Qwen3-8B", "Qwen3-8B"),
        ("Qwen3-8B-SFT", "Qwen3-8B"),
        ("Qwen3-30B-A3B-Base", "Qwen3-30B-A3B"),
    ],
)
def test_a_missing_folder_is_planned_by_its_name_and_says_so(tmp_path: Path, folder: str, name: str):
    note = planned_model(tmp_path / folder).note
    assert f"the shape of {name}," in note
    assert str(tmp_path / folder) in note


@pytest.mark.parametrize("folder", ["Qwen3-80B", "Qwen3", "mine"])
def test_a_missing_folder_of_another_name_is_refused(tmp_path: Path, folder: str):
    with pytest.raises(ArchitectureError, match="Qwen3-8B-Base"):
        planned_model(tmp_path / folder)


def test_a_folder_that_is_there_is_read(tmp_path: Path):
    folder = write_tiny_model(tmp_path / "Qwen3-8B", weights=False)
    assert planned_model(folder).architecture.num_layers == 4
    assert planned_model(folder).note == ""
    (folder / "config.json").unlink()
    with pytest.raises(ArchitectureError, match=r"config\.json"):
        planned_model(folder)


@pytest.mark.parametrize(
    ("start", "toml", "processes"),
    [(start_sft, "sft_32k.toml", 64), (start_gppo, "gppo_32k.toml", 8), (start_gppo, "gppo_code_32k.toml", 8)],
)
def test_the_recipes_are_planned_without_their_models(start, toml, processes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        start(["--config", str(EXAMPLES / toml), f"--dry-run={processes}"])
    shown = capsys.readouterr()
    assert caught.value.code == 0
    assert "comes with this package" in shown.out
    assert "8,190,735,360" in shown.out
    if start is start_gppo:  # 48.27 + 2 x 3; weights 3.81 + 3 + 0.6 x 79.6
        assert "trainer awake, server asleep         54.27 GiB (fits)" in shown.out
        assert "trainer asleep, server awake         54.57 GiB (fits)" in shown.out
    assert "this machine lacks" in shown.out
    with pytest.raises(SystemExit) as caught:
        start(["--config", str(EXAMPLES / toml), f"--dry-run={processes}", "--parallel.tensor", "3"])
    assert caught.value.code == 2


@pytest.mark.parametrize(("processes", "total"), [(16, "48.1"), (64, "32.1")])
def test_the_recipe_with_experts_takes_what_it_says(processes: int, total: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", str(EXAMPLES / "sft_30b_a3b_32k.toml"), f"--dry-run={processes}"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "30,532,122,624, 3,353,032,704 met by a token" in shown
    found = next(line.split()[1] for line in shown.splitlines() if line.strip().startswith("total"))
    assert f"{float(found):.1f}" == total
    rows = (EXAMPLES / "sft_30b_a3b_32k.toml").read_text().splitlines()
    assert any(row.startswith(f"#      {processes}") and f"{total}   these settings" in row for row in rows)


def test_a_run_itself_never_takes_a_shipped_shape(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        start_sft(["--config", str(EXAMPLES / "sft_32k.toml")])
    assert caught.value.code == 2
    assert "config.json does not exist" in capsys.readouterr().err
