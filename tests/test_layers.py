"""The house rules: imports point one way, heavy packages stay in their room, files and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_klear"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

BOTTOM = {"errors", "types", "zigzag", "architecture", "toml_writer", "schema"}
BASE = BOTTOM - {"toml_writer", "schema"}
SETTINGS = BOTTOM | {"config", "rl_config", "settings"}
CHECKS = SETTINGS | {"checks", "estimate"}
START = CHECKS | {"start"}

# What each room (a subpackage or a module of the package) may import of the others. A new room is entered here first.
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "zigzag": set(),
    "architecture": {"errors"},
    "toml_writer": set(),
    "schema": set(),
    "rl": BASE,
    "data": BASE,
    "rewards": BASE,
    "kernels": BASE,
    "config": BASE | {"rl", "data", "rewards", "kernels"},
    "rl_config": BASE | {"rl", "data", "rewards", "config"},
    "settings": BOTTOM,
    "checks": SETTINGS,
    "estimate": SETTINGS,
    "start": CHECKS,
    "mcore": SETTINGS | {"kernels"},
    "rollout": SETTINGS | {"data", "mcore"},
    "train": START | {"rl", "data", "rewards", "kernels", "mcore", "rollout"},
    "evaluation": START | {"data", "rewards", "mcore", "rollout"},
}

# Packages that one room alone imports, as a path prefix inside the package.
CONFINED = {
    "megatron": ("mcore/",),
    "transformer_engine": ("mcore/",),
    "apex": ("mcore/",),
    "amp_C": ("mcore/",),
    "vllm": ("rollout/",),
}

# Modules that must import without any of HEAVY.
LIGHT = ["config", "settings", "checks", "schema", "data.packing", "rewards"]
HEAVY = ("torch", "transformers", "megatron", "vllm")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def all_files() -> list[Path]:
    scripts = list(ROOT.glob("*.py"))
    return [*scripts, *python_files(PACKAGE, "tools", "tests", "examples")]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, those for type checking alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_is_in_the_table():
    found = {room_of(path) for path in python_files(PACKAGE)} - {"__init__"}
    assert found <= set(MAY_IMPORT), f"enter {found - set(MAY_IMPORT)} in MAY_IMPORT"


def test_the_table_points_one_way():
    """No chain of allowed imports leads back to its room."""
    for start, allowed in MAY_IMPORT.items():
        reached, open_rooms = set(), set(allowed)
        while open_rooms:
            room = open_rooms.pop()
            reached.add(room)
            open_rooms |= MAY_IMPORT[room] - reached
        assert start not in reached, f"{start} is reached from itself"


def test_imports_between_rooms_follow_the_table():
    wrong = []
    for path in python_files(PACKAGE):
        room = room_of(path)
        targets = {name.split(".")[1] for name in imported(path) if name.startswith(PACKAGE + ".")}
        wrong += [f"{name_of(path)} imports {target}" for target in targets - MAY_IMPORT.get(room, set()) - {room}]
    assert not wrong, wrong


def test_confined_packages_stay_in_their_room():
    wrong = []
    for path in all_files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        inside = name_of(path).removeprefix(PACKAGE + "/")
        for name in imported(path):
            rooms = CONFINED.get(name.split(".")[0])
            if rooms is not None and not inside.startswith(rooms):
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong, wrong


def test_vllm_is_imported_by_one_file_at_most():
    files = [path for path in python_files(PACKAGE) if any(name.split(".")[0] == "vllm" for name in imported(path))]
    assert len(files) <= 1, files


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_bring_nothing_heavy(module):
    code = f"import sys, {PACKAGE}.{module}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [], f"{PACKAGE}.{module} imports {shown}"


def test_no_file_is_too_long():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in all_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    wrong = {}
    for path in all_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    wrong[f"{name_of(path)} {node.name}"] = lines
    assert wrong == {}
