"""Imports point one way, heavy packages stay in their room, files and functions stay small."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_klear"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Layers from below: a room imports rooms of lower layers and itself; islands do not import each other.
BOTTOM = {"errors", "types", "models"}
ISLANDS = {"rl", "data", "rewards", "kernels", "statistics"}
# Whoever talks to other ranks does it by this room.
RANKS = {"distributed"}
UP_TO_CONFIG = BOTTOM | RANKS | ISLANDS | {"config"}
ENGINES = {"mcore", "rollout"}
UP_TO_RUNS = UP_TO_CONFIG | ENGINES | {"runs"}
UP_TO_TRAIN = UP_TO_RUNS | {"evaluation", "curation", "ablations", "orchestrator", "train"}
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "models": {"errors", "types"},
    "distributed": {"errors"},
    **dict.fromkeys(ISLANDS, BOTTOM),
    "statistics": set(),
    "config": BOTTOM | ISLANDS,
    # The trainer's engine is given its loss and its batches.
    "mcore": BOTTOM | RANKS | {"config", "kernels"},
    "rollout": UP_TO_CONFIG,
    "runs": UP_TO_CONFIG | ENGINES,
    "evaluation": UP_TO_CONFIG | ENGINES | {"runs"},  # the page has the run report's style
    # Files to files, without torch: it grades by the rewards and asks servers by the evaluation's client.
    "curation": BOTTOM | {"data", "rewards", "statistics", "config", "runs", "evaluation"},
    # Starts the commands of others, and reads what they left.
    "ablations": BOTTOM | {"statistics", "config", "runs"},
    # Another process than the trainer's: it meets no rank and no Megatron, but its messages have the form of theirs.
    "orchestrator": BOTTOM | RANKS | ISLANDS | {"config", "rollout", "runs"},
    "train": UP_TO_RUNS | {"evaluation", "orchestrator"},
    "verify": UP_TO_TRAIN,
    "cli": UP_TO_TRAIN | {"verify"},
}
ROOT_FILES = {"__init__.py", "errors.py", "types.py", "py.typed"}
ONLY_IN = {
    "megatron": {"mcore"},
    "transformer_engine": {"mcore"},
    "apex": {"mcore"},
    "flash_attn": {"mcore"},
    "vllm": {"rollout"},
    "ray": {"rewards", "curation"},
    "rensa": {"curation"},
}
OBJECT_COLLECTIVES = re.compile(r"\b(all_gather|broadcast|gather|scatter)_object(_list)?\(")
WITHOUT_TORCH = [
    "config",
    "config.rl",
    "config.rollout",
    "config.read",
    "config.overrides",
    "config.plan",
    "config.launch",
    "config.cost_seconds",
    "config.checks",
    "config.checks_rollout",
    "config.placement",
    "config.start",
    "orchestrator.process",
    "rewards",
    "statistics.figures",
    "data.packing",
    "data.sources",
    "curation.verbs",
]


def room_of(path: Path) -> str:
    """`data` of megatron_klear/data/store.py, `types` of megatron_klear/types.py, the file's own path outside."""
    if not path.is_relative_to(PACKAGE):
        return path.relative_to(ROOT).as_posix()
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, source: str) -> Iterator[str]:
    """The full names of all modules that `source` imports, also inside functions and for type checking."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    """What of `source`, lying at `path`, imports against the rules."""
    room, found = room_of(path), []
    for module in imported_modules(path, source):
        top, _, rest = module.partition(".")
        if room not in ONLY_IN.get(top, {room}):
            found.append(f"{room} imports {module}: only {', '.join(ONLY_IN[top])} may")
        target = rest.partition(".")[0]
        if top == PACKAGE.name and path.is_relative_to(PACKAGE) and target not in ALLOWED[room] | {room}:
            found.append(f"{room} imports {module}")
    return found


def test_every_room_has_its_rule():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == ALLOWED.keys(), "say in this file what the new room may import"


def test_the_root_holds_no_more_than_types_and_errors():
    listed = subprocess.run(["git", "ls-files", "megatron_klear"], cwd=ROOT, text=True, capture_output=True, check=True)
    found = {Path(line).name for line in listed.stdout.split("\n") if len(Path(line).parts) == 2}
    assert found == ROOT_FILES


def test_git_ignores_no_source():
    ignored = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "*.py", "*.json", "*.toml"]
    found = subprocess.run(ignored, cwd=PACKAGE, text=True, capture_output=True, check=True)
    assert found.stdout == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path):
    if path == PACKAGE / "__init__.py":
        assert not [name for name in imported_modules(path, path.read_text()) if name.startswith(PACKAGE.name)]
    else:
        assert not broken_rules(path, path.read_text())


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("mcore/engine.py", "from megatron_klear.rl.losses import GPPO"),
        ("mcore/engine.py", "from ..data import packing"),
        ("kernels/ops.py", "import megatron_klear.rl"),
        ("rl/losses.py", "from megatron_klear import kernels"),
        ("data/store.py", "def late():\n    from ..config import DataConfig"),
        ("types.py", "from .config import RunConfig"),
        ("train/sft.py", "from megatron.core import parallel_state"),
        ("train/sft.py", "def late():\n    import vllm"),
        ("train/grading.py", "import ray"),
        ("rollout/local/engine.py", "from megatron_klear.train import sft"),
        ("config/start.py", "import megatron_klear.mcore.engine"),
        ("curation/run.py", "from megatron_klear.train import sft"),
    ],
)
def test_the_rule_sees_an_import_that_points_up(where: str, line: str):
    assert broken_rules(PACKAGE / where, line)


def test_objects_cross_ranks_in_one_module():
    here = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if OBJECT_COLLECTIVES.search(path.read_text())
    ]
    assert here == ["distributed/exchange.py"]


def test_looking_at_settings_and_data_imports_no_torch():
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'megatron_klear.{name}')\n"
        "    assert not {'torch', 'transformers'} & sys.modules.keys(), f'{name} imports torch or transformers'\n"
    )
    command = [sys.executable, "-c", program, *WITHOUT_TORCH]
    ran = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path: Path):
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
