"""What the documentation and the examples promise stands in the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.config.base import SFTConfig
from megatron_klear.config.evaluation import EvaluationConfig
from megatron_klear.config.read import load
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.schema import keys_of
from megatron_klear.curation.build_config import BuildConfig
from megatron_klear.curation.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = (SFTConfig, GPPOConfig, EvaluationConfig, *(verb.settings for verb in VERBS.values()))
# The two stages of the quickstart have a script between them, and the run to look at is the second one's.
OUTPUTS = {"quickstart_gppo": "quickstart"}
SCRIPT_OF = {"quickstart_sft": "quickstart", "quickstart_gppo": "quickstart", "sft_code_tiny_cpu": "gppo_code_tiny_cpu"}
SFT_CONFIGS = sorted((ROOT / "examples").glob("*sft*.toml"))
GPPO_CONFIGS = sorted((ROOT / "examples").glob("*gppo*.toml"))
DATA_CONFIGS = sorted((ROOT / "examples").glob("data_*.toml"))
CONFIGS = [
    *((path, SFTConfig) for path in SFT_CONFIGS),
    *((path, GPPOConfig) for path in GPPO_CONFIGS),
    *((path, BuildConfig) for path in DATA_CONFIGS),
]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("*.slurm"), ROOT / "tests" / "run.sh"])
RESULTS = sorted((ROOT / "examples" / "results").iterdir())
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])


def test_settings_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "tools/document_config.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("path", "schema"), CONFIGS, ids=lambda value: getattr(value, "name", ""))
def test_example_settings_are_valid(path: Path, schema: type[SFTConfig | GPPOConfig | BuildConfig]):
    config = load(schema, ["--config", str(path)])
    assert config.output == Path("runs") / OUTPUTS.get(path.stem, path.stem)


@pytest.mark.parametrize("path", [path for path, _ in CONFIGS], ids=lambda path: path.name)
def test_every_example_is_in_the_table(path: Path):
    name = SCRIPT_OF.get(path.stem, path.stem)
    assert path.with_name(f"{name}.sh").is_file()
    assert f"`{name}`" in (ROOT / "examples" / "README.md").read_text()


def test_the_recipe_is_that_of_the_paper():
    config = load(GPPOConfig, ["--config", str(ROOT / "examples" / "gppo_32k.toml")])
    algorithm, sampling, optimizer = config.algorithm, config.sampling, config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay) == (1e-6, 10, 0.1)
    assert (algorithm.prompts_per_step, algorithm.generated_prompts, algorithm.prompts_per_update) == (128, 256, 16)
    assert (sampling.samples_per_prompt, sampling.max_tokens, sampling.temperature) == (8, 32768, 1.0)
    assert (config.loss.clip_low, config.loss.clip_high, algorithm.nll_coefficient) == (0.2, 0.28, 0.1)
    assert (config.validation.sampling.temperature, config.validation.sampling.top_p) == (0.6, 0.95)


def test_the_code_stage_differs_from_mathematics_where_the_paper_does():
    files = [str(ROOT / "examples" / name) for name in ("gppo_32k.toml", "gppo_code_32k.toml")]
    maths, code = (load(GPPOConfig, ["--config", file]) for file in files)
    assert (code.optimizer.learning_rate, code.algorithm.prompts_per_update) == (5e-7, 32)
    assert code.reward.code.kind == "soft"
    assert code.optimizer.model_copy(update={"learning_rate": 1e-6}) == maths.optimizer
    assert code.algorithm.model_copy(update={"prompts_per_update": 16}) == maths.algorithm
    assert (code.sampling, code.loss, code.rollout) == (maths.sampling, maths.loss, maths.rollout)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_figures_in_the_readme_are_those_of_the_committed_results(folder: Path):
    done = subprocess.run([sys.executable, "tools/gain.py", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("| ", "reward_mean"))]
    readme = (ROOT / "examples" / "README.md").read_text()
    assert len(told) >= 4
    assert [line for line in told if line not in readme] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(path: Path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "path", [*PAGES, *SCRIPTS, *SFT_CONFIGS, *GPPO_CONFIGS, *DATA_CONFIGS], ids=lambda path: path.name
)
def test_files_and_flags_that_are_named_exist(path: Path):
    text = path.read_text()
    files = re.findall(
        r"(?<![\w/.])((?:tools|examples|tests|docs|megatron_klear|csrc)/[\w./-]*\.(?:py|sh|toml|md|slurm|jsonl|h))",
        text,
    )
    assert [name for name in files if not (ROOT / name).exists()] == []
    known = {name for schema in SCHEMAS for name in keys_of(schema)}
    tables = {name.split(".")[0] for name in known}
    flags = {flag.replace("-", "_").rstrip(".") for flag in re.findall(r"--([a-z]+\.[a-z_0-9.*-]+)", text)}
    # The entries of this table are the reader's own.
    flags = {flag for flag in flags if flag.split(".")[0] in tables and not flag.startswith("reward.functions.")}
    parts = {f"{'.'.join(name.split('.')[:depth])}.*" for name in known for depth in range(1, name.count(".") + 1)}
    assert flags - known - parts == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
