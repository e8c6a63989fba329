"""Every command that the documentation shows runs in a bare clone, or says in words what it needs.

The fenced bash blocks of the pages are taken out and run in order. COMMANDS says how each is checked, by its exact
text: a command that is not listed fails here, so that the pages cannot drift.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += ["examples/README.md", "tools/benchmark/README.md", "CONTRIBUTING.md"]


@dataclass(frozen=True)
class Runs:
    """Ends with exit code 0, once `extra` is appended and `swap` replaced."""

    extra: str = ""
    swap: tuple[str, str] = ("", "")
    shows: str = ""


@dataclass(frozen=True)
class Refused:
    """Ends with another exit code, before work starts, without a traceback, and says this, once `swap` is replaced."""

    told: str
    swap: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Exempt:
    """Not run here."""

    reason: str


SHORT_SFT = "--train.steps 2"
SHORT_GPPO = (
    "--train.steps 1 --algorithm.prompts_per_step 2 --algorithm.generated_prompts 2 --algorithm.prompts_per_update 2 "
    "--sampling.samples_per_prompt 2 --sampling.max_tokens 8 --validation.every 0 --reward.workers 1"
)


def few(name: str, file: str, samples: int, limit: int) -> str:
    """Flags of an evaluation that ends in seconds."""
    benchmark = f'{{name = "{name}", files = ["{file}"], samples = {samples}, limit = {limit}}}'
    return f"--sampling.max_tokens 4 --reward.workers 1 --benchmarks '[{benchmark}]'"


SHORT_EVALUATION = "--config examples/quickstart_evaluate.toml " + few(
    "held_out_sums", "runs/quickstart_data/held_out.jsonl", 2, 4
)
VLLM = Exempt("installs vLLM, 2 GB; tests/unit/test_make_vllm_env.py and the tests marked vllm run its parts")
FEWER = ("--nproc-per-node 8", "--nproc-per-node 2")
NO_8B = Refused("models/Qwen3-8B-Base/config.json does not exist", swap=FEWER)
NO_TUNED_8B = Refused("models/Qwen3-8B-SFT/config.json does not exist", swap=FEWER)
TESTS = Exempt("these tests are in the run that this one is in")
TINY = "examples/sft_tiny_cpu.toml"
KLEAR = ("klear", "python -m megatron_klear.cli")

COMMANDS: dict[str, Runs | Refused | Exempt] = {
    "bash examples/quickstart.sh": Exempt("minutes; its stages, shortened, are this file's fixture"),
    "bash tests/run.sh": Exempt("runs this test"),
    "pre-commit install": Exempt("changes the clone's hooks and downloads linters at the first commit"),
    ". examples/setup_env.sh": Runs(),
    "klear --help": Runs(swap=KLEAR, shows="doctor"),
    # training
    f"python pretrain_sft.py --config {TINY}": Runs(SHORT_SFT),
    f"torchrun --nproc-per-node 2 pretrain_sft.py --config {TINY} --output runs/tp2 --parallel.tensor 2": Runs(
        SHORT_SFT
    ),
    # The same run in two processes but for a flag, which is read and checked here.
    f"torchrun --nproc-per-node 2 pretrain_sft.py --config {TINY} --parallel.tensor 2 --output runs/tp2": Runs(
        "--dry-run"
    ),
    f"torchrun --nproc-per-node 2 -m megatron_klear.cli sft --config {TINY} --output runs/dp2": Runs("--dry-run"),
    f"torchrun --nproc-per-node 2 pretrain_sft.py --config {TINY} --optimizer.learning_rate 2e-3 "
    "--output runs/faster": Runs("--dry-run"),
    "python pretrain_sft.py --config examples/sft_32k.toml --dry-run=64": Runs(shows="this machine lacks"),
    "torchrun --nproc-per-node 8 pretrain_sft.py --config examples/sft_32k.toml": NO_8B,
    "python train_gppo.py --config examples/quickstart_gppo.toml --output runs/again": Runs(SHORT_GPPO),
    "python train_gppo.py --config examples/gppo_32k.toml --dry-run=8": Runs(shows="this machine lacks"),
    "torchrun --nproc-per-node 8 train_gppo.py --config examples/gppo_32k.toml": NO_TUNED_8B,
    "bash examples/gppo_32k.sh": Refused("model.path models/Qwen3-8B-SFT: there is no such folder"),
    "bash examples/gppo_code_tiny_cpu.sh --train.steps 20 --output runs/code": Exempt(
        "minutes; tests/end_to_end/test_code_stage.py runs its stages shorter"
    ),
    "bash examples/sft_lora_tiny_cpu.sh": Exempt("a minute and more; tests/end_to_end/test_lora_runs.py runs shorter"),
    "bash examples/gppo_lora_tiny_cpu.sh": Exempt("minutes; tests/end_to_end/test_lora_runs.py runs shorter"),
    "python pretrain_sft.py --config examples/sft_32k.toml --lora.rank 32 --optimizer.learning_rate 8e-4 "
    "--dry-run=8": Runs(shows="trained, in adapters"),
    # evaluation
    "python evaluate.py --config examples/evaluate_gsm8k.toml --model.path runs/quickstart/hf": Runs(
        few("gsm8k", "examples/data/gsm8k_test_100.jsonl", 1, 2),
        shows="| gsm8k | 2 x 1 |",
    ),
    "python evaluate.py --config examples/evaluate_gsm8k.toml --endpoint.urls http://127.0.0.1:8000/v1 "
    "--endpoint.model mine": Exempt("asks a server; tests/unit/test_evaluation_endpoint.py has one"),
    "python evaluate.py --benchmarks": Runs(shows="hmmt_feb_2025"),
    "python evaluate.py --compare runs/quickstart_evaluation/sft runs/quickstart_evaluation/gppo": Runs(
        shows="held_out_sums, 4 problems"
    ),
    "klear ablate --summary examples/ablations/results": Runs(swap=KLEAR, shows="GPPO above clip-higher"),
    "klear ablate --list": Runs(swap=KLEAR, shows="How clipped tokens are treated"),
    "klear ablate examples/ablations/clip.toml": Exempt("a quarter of an hour; docs/ablations.md has what came out"),
    "klear ablate examples/ablations/clip.toml --scale 8b --dry-run": Runs(
        swap=KLEAR, shows="--config examples/gppo_32k.toml"
    ),
    "python tools/grade.py code --input responses.jsonl --output graded.jsonl": Refused(
        "responses.jsonl cannot be read"
    ),
    "bash examples/gppo_vllm_tiny_cpu.sh": VLLM,
    "bash tools/make_vllm_env.sh --cpu vllm-env": VLLM,
    "python tools/serve_rollouts.py --config $CONFIG --rollout.server.host 0.0.0.0 --rollout.server.port 8000": Refused(
        "make vLLM's environment with `bash tools/make_vllm_env.sh vllm-env`"
    ),
    """python train_gppo.py --config $CONFIG --rollout.servers '["http://node7:8000"]'""": Exempt(
        "waits for a server on another machine; tests/end_to_end/test_vllm_server.py has one"
    ),
    # conversion, data, reports
    "python tools/convert_hf_to_mcore.py --hf runs/quickstart_sft/hf --out data/tiny-mcore --tensor 2": Runs(),
    "python tools/inspect_checkpoint.py data/tiny-mcore": Runs(shows="every file as its manifest says"),
    "python tools/convert_mcore_to_hf.py --mcore data/tiny-mcore --out data/tiny-hf": Runs(),
    "klear convert --mcore runs/gppo_lora_tiny_cpu/checkpoints/step-00000040 --out runs/adapter": Exempt(
        "needs the run; tests/distributed/test_lora_checkpoint.py converts one"
    ),
    "klear convert --mcore runs/gppo_lora_tiny_cpu/checkpoints/step-00000040 --base runs/quickstart_sft/hf "
    "--out runs/merged": Exempt("likewise"),
    "python tools/prepare_data.py arithmetic --count 500 --digits 3 --output runs/data/arithmetic.jsonl": Runs(),
    "klear curate deduplicate --input examples/data/gsm8k_train_300.jsonl examples/data/arithmetic_600.jsonl "
    "--output runs/curated/distinct/rows.jsonl": Runs(swap=KLEAR, shows="rows kept"),
    r"echo 'Put the final answer in \boxed{}.' >runs/curated/instruction.txt": Runs(),
    "klear curate decontaminate --input runs/curated/distinct/rows.jsonl --output runs/curated/clean/rows.jsonl "
    "--against examples/data/gsm8k_test_100.jsonl --template runs/curated/instruction.txt --rule careful": Runs(
        swap=KLEAR, shows="897 of 897 rows kept"
    ),
    "klear curate filter-code --input examples/data/mbpp_train_100.jsonl --output runs/curated/tested/rows.jsonl "
    "--reference response --min-tests 3": Runs(swap=KLEAR, shows="100 of 100 rows kept"),
    "klear curate distill --input rows.jsonl --output runs/curated/sft/rows.jsonl "
    "--endpoint.urls http://127.0.0.1:8000/v1 --endpoint.model DeepSeek-R1-0528": Exempt(
        "asks a server; tests/unit/test_curation_distill.py has one"
    ),
    "klear curate build --config examples/data_math.toml --dry-run": Runs(swap=KLEAR, shows="1 deduplicate"),
    f"python tools/inspect_data.py --config {TINY} --index 3": Runs(),
    "python tools/report.py examples/results/gppo_smollm2_arithmetic --out runs/report.html": Runs(),
    "python tools/report.py runs/quickstart examples/results/gppo_smollm2_arithmetic --out runs/compared.html "
    '--title "Two runs" --png runs/figures': Runs(),
    """echo '{"gold": "1/2", "pred": "The answer is \\\\boxed{0.5}."}' >runs/predictions.jsonl""": Runs(),
    "python tools/grade.py math --input runs/predictions.jsonl --output runs/graded.jsonl": Runs(shows="right"),
    # verification
    f"python tools/verify.py layouts --config {TINY}": Runs("--processes 1 --steps 1 --data.max_length 64"),
    f"torchrun --nproc-per-node 2 tools/verify.py layouts --config {TINY}": Exempt(
        "minutes; the line before runs it in one process, tests/distributed/test_layouts.py in all layouts"
    ),
    f"python tools/verify.py resume --config {TINY} --kills 5 --steps 12 --processes 2": Exempt(
        "minutes; tests/end_to_end/test_verify.py runs it shorter"
    ),
    # kernels, benchmarks
    "python setup.py build_ext --inplace": Exempt("compiles for minutes; tests/kernels/test_build.py does"),
    "pytest tests/kernels/test_rows.py tests/kernels/test_rows_extremes.py": TESTS,
    "pytest tests/kernels/test_build.py": TESTS,
    "pytest -m gpu tests/kernels/test_rows_cuda.py": TESTS,
    "pytest -k emulated tests/kernels/test_rows_cuda.py": TESTS,
    "pytest tests/kernels/test_rows_emulated.py tests/kernels/test_rows_choice.py": TESTS,
    "pytest tests/kernels/test_rows_pairs.py": TESTS,
    "pytest tests/kernels/test_rows_planted.py": TESTS,
    "pytest tests/kernels/test_fused_emulated.py": TESTS,
    "pytest tests/kernels/test_sharded_emulated.py tests/kernels/test_sharded_choice.py "
    "tests/kernels/test_sharded_planted.py": TESTS,
    "pytest -m gpu tests/kernels/test_sharded_gpu.py": TESTS,
    "compute-sanitizer --tool memcheck --error-exitcode 9 python -m pytest -m gpu tests/kernels/test_rows_cuda.py "
    "-k small": Exempt("needs a CUDA device and its toolkit"),
    "bash tools/benchmark/gpu_suite.sh": Exempt("needs a CUDA device; says `torch sees no CUDA device` without"),
    "python tools/benchmark/cost.py --models 8B 32B 30B-A3B 235B-A22B --gpus 8 64 256 1024": Runs(
        swap=("8B 32B 30B-A3B 235B-A22B --gpus 8 64 256 1024", "8B --gpus 8"), shows="COMPUTED, not measured"
    ),
    "python tools/benchmark/row_kernel_model.py": Exempt("needs nvcc; says so without, and test_benchmark.py counts"),
    "python tools/benchmark/policy_loss.py": Exempt("minutes; tests/kernels/test_benchmark.py runs it shorter"),
    "python tools/benchmark/sft.py --threads 1": Exempt(
        "minutes; tests/distributed/test_sft_benchmark.py runs it shorter"
    ),
    "OMP_NUM_THREADS=1 python tools/benchmark/rollouts.py --vllm vllm-env/bin/python": Exempt(
        "minutes; tests/distributed/test_rollout_benchmark.py runs it shorter"
    ),
}


NAMED = Exempt("a name, not a command to be typed as it stands")
INLINE: dict[str, Runs | Refused | Exempt] = {
    "bash examples/gppo_code_tiny_cpu.sh": COMMANDS[
        "bash examples/gppo_code_tiny_cpu.sh --train.steps 20 --output runs/code"
    ],
    "klear ablate examples/ablations/soft_reward.toml --jobs 2": Exempt(
        "half an hour; docs/ablations.md has what came out"
    ),
    "klear ablate examples/ablations/clip.toml --scale smollm2 --jobs 2": Exempt("most of an hour"),
    "klear ablate examples/ablations/lora.toml": Exempt("half an hour; docs/ablations.md has what came out"),
    "python tools/benchmark/lora.py": Exempt("minutes; says what its results hold"),
    "python tools/benchmark/interval_coverage.py": Runs("--repeats 2 --out runs/coverage.json", shows="30, 64, 0.67"),
    "bash examples/data_math.sh": Exempt(
        "the build is run above; tests/end_to_end/test_curation_build.py trains on its sets"
    ),
    "bash tests/te/fetch_packages.sh": Exempt("continuous integration fetches the packages by it"),
    'pip install "megatron-klear[te]"': Exempt("builds a CUDA extension"),
    "pip install": NAMED,
    'pip install "megatron-klear[curation]"': Exempt("setup_env.sh installs it for the tests of near duplicates"),
    'pip install "megatron-klear[ray]"': Exempt("setup_env.sh installs it for the tests of Ray"),
    "klear sft": NAMED,
    "klear convert": NAMED,
    "klear curate": NAMED,
    "klear extend": NAMED,
    "klear extend --model FOLDER --output LONG": NAMED,
    "klear curate VERB --help": NAMED,
    "klear curate build": NAMED,
    "pytest -m gpu": Exempt("needs a CUDA device"),
    "python tools/prepare_data.py": Runs("--help"),
    "python tools/losses.py": Runs(shows="clip_cov"),
    "python tools/gain.py RUN": Runs(swap=("RUN", "examples/results/gppo_smollm2_arithmetic")),
    "python tools/gain.py examples/results/gppo_smollm2_arithmetic": Runs(),
    "python tools/verify.py weights --config run.toml": Exempt("tests/end_to_end/test_verify_rollouts.py runs it"),
    "KLEAR_VLLM_EXPERTS=1 bash tests/run.sh -k experts_arrive": Exempt("minutes, with a real server of its own"),
    "pytest tests/distributed/test_memory.py": TESTS,
    "pytest tests/distributed/test_activation_offload.py": TESTS,
    "KLEAR_KILL_VLLM=1 bash tests/run.sh -k killed_vllm": Exempt("minutes of real servers, in the run that this is in"),
    'python -c "from megatron_klear.kernels import available; print(available())"': Runs(shows="built=True"),
    "python tools/document_config.py": Runs("--check"),
    "bash examples/sft_tiny_cpu.sh --train.epochs 5 --output runs/short": Runs(SHORT_SFT),
    "bash examples/quickstart.sh": COMMANDS["bash examples/quickstart.sh"],
    "bash examples/gppo_smollm2_arithmetic.sh": Exempt("an hour, and a model to download"),
    "python tools/benchmark/rollout_modes.py --train.steps 30 --algorithm.prompts_per_update 8 --validation.every 0": (
        Exempt("most of an hour; says what examples/results holds")
    ),
}
"""Commands inside sentences."""


def inline_commands_of(page: str) -> list[str]:
    """The commands of a page's sentences, in order, one a line."""
    sentences = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", sentences))
    starts = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|bash|sh|pytest|klear|pip|srun|sbatch) ")
    return [span for span in spans if starts.match(span)]


def commands_of(page: str) -> list[str]:
    """The commands of a page's fenced bash blocks in order, one a line, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in map(_bare, block.splitlines()) if line]


def _bare(line: str) -> str:
    return re.sub(r"(^|\s+)# .*$", "", line).strip()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git would give of the working tree, the compiled kernel, and the quickstart's stages after a step or two."""
    folder = tmp_path_factory.mktemp("bare") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for kernel in (ROOT / "megatron_klear" / "kernels").glob("_policy_loss*.so"):
        shutil.copy(kernel, folder / "megatron_klear" / "kernels")
    arithmetic = "python tools/prepare_data.py arithmetic --terms 2 --digits 1 --operators=+-"
    for command in (
        f"{arithmetic} --count 20 --seed 1000 --output runs/quickstart_data/held_out.jsonl",
        f"{arithmetic} --count 200 --seed 1 --output runs/quickstart_data/sft.jsonl",
        f"{arithmetic} --count 200 --seed 2 --output runs/quickstart_data/problems.jsonl",
        "python tools/make_tiny_model.py --output runs/quickstart_data/model --no-weights",
        f"python pretrain_sft.py --config examples/quickstart_sft.toml {SHORT_SFT}",
        f"python train_gppo.py --config examples/quickstart_gppo.toml {SHORT_GPPO}",
        *(
            f"python evaluate.py {SHORT_EVALUATION} --output runs/quickstart_evaluation/{name} --model.path {model}/hf"
            for name, model in (("sft", "runs/quickstart_sft"), ("gppo", "runs/quickstart"))
        ),
    ):
        ran = run(command, folder)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
    return folder


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Commands that were run."""
    return set()


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In bash, with this Python's environment as the active one, as `. examples/setup_env.sh` leaves it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "KLEAR_VENV": "none", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "KLEAR_VLLM_PYTHON"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of((ROOT / page).read_text())])
def test_the_commands_of_a_page_run_in_order(clone: Path, seen: set[str], page: str):
    """A command that another page has shown by then, to the letter, has been run in the clone already."""
    preamble = ""
    for command in commands_of((ROOT / page).read_text()):
        if command.startswith("export "):
            preamble += f"{command}; "
            continue
        check_command(command, COMMANDS[command], clone, seen, preamble)


def check_command(
    command: str, check: Runs | Refused | Exempt, clone: Path, seen: set[str], preamble: str = ""
) -> None:
    """Run a command as its check says, unless it was run by then."""
    if isinstance(check, Exempt):
        return
    asked = command.replace(*check.swap) + (f" {check.extra}" if isinstance(check, Runs) else "")
    if asked in seen and not preamble:
        return
    seen.add(asked)
    ran = run(preamble + asked, clone)
    shown = ran.stdout + ran.stderr
    if isinstance(check, Runs):
        assert ran.returncode == 0, f"{asked}\n{shown}"
        assert check.shows in shown, f"{asked}\n{shown}"
    else:
        assert ran.returncode != 0, f"{asked}\n{shown}"
        told = [line for line in shown.splitlines() if check.told in line]
        assert len(told) == 1, f"{asked}\n{shown}"
        assert f'File "{clone}' not in shown, f"a traceback of ours: {asked}\n{shown}"


@pytest.mark.slow
def test_commands_inside_sentences_run(clone: Path, seen: set[str]):
    for command, check in INLINE.items():
        check_command(command, check, clone, seen)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_listed(page: str):
    shown = [command for command in commands_of((ROOT / page).read_text()) if not command.startswith("export ")]
    assert [command for command in shown if command not in COMMANDS] == [], "say in COMMANDS how to check them"


def test_every_listed_command_is_shown():
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert set(COMMANDS) - {command for text in texts for command in commands_of(text)} == set()
    assert set(INLINE) == {command for text in texts for command in inline_commands_of(text)}


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_from_this_test(page: str):
    text = re.sub(r"^```bash\n.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    hidden = re.findall(r"^\s*(?:[A-Z_]+=\S+ )*(?:python|torchrun|bash|sh|pytest|klear|pip) .*$", text, re.MULTILINE)
    assert hidden == [], "commands stand in fenced bash blocks"


def test_the_console_command_is_the_one_that_modules_start():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"klear": "megatron_klear.cli:main"}
