"""What the documentation and the examples promise stands in the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.config import SFTConfig
from megatron_klear.schema import keys_of
from megatron_klear.settings import load

ROOT = Path(__file__).resolve().parents[2]
SFT_CONFIGS = sorted((ROOT / "examples").glob("sft_*.toml"))
SCRIPTS = sorted([*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("*.slurm"), ROOT / "tests" / "run.sh"])
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])


def test_settings_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/document_config.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SFT_CONFIGS, ids=lambda path: path.name)
def test_example_settings_are_valid(path: Path):
    config = load(SFTConfig, ["--config", str(path)])
    assert config.output == Path("runs") / path.stem


@pytest.mark.parametrize("path", SFT_CONFIGS, ids=lambda path: path.name)
def test_every_example_is_in_the_table(path: Path):
    assert path.with_suffix(".sh").is_file()
    assert f"`{path.stem}`" in (ROOT / "examples" / "README.md").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(path: Path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, *SFT_CONFIGS], ids=lambda path: path.name)
def test_files_and_flags_that_are_named_exist(path: Path):
    text = path.read_text()
    files = re.findall(
        r"(?<![\w/.])((?:tools|examples|tests|docs|megatron_klear|csrc)/[\w./-]*\.(?:py|sh|toml|md|slurm|jsonl|h))",
        text,
    )
    assert [name for name in files if not (ROOT / name).exists()] == []
    tables = {name.split(".")[0] for name in keys_of(SFTConfig)}
    flags = [flag for flag in re.findall(r"--([a-z]+\.[a-z_0-9.]+)", text) if flag.split(".")[0] in tables]
    assert [flag for flag in flags if flag not in keys_of(SFTConfig)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
