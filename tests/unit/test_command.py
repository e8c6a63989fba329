"""The command `klear`, the scripts that are thin over it, and the way into the environment from another Python."""

import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_klear import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    if "megatron_klear.cli import main" in path.read_text()
)


def run(*command: object, folder: Path = ROOT, **variables: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in (os.environ | variables).items() if value is not None}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, text=True, capture_output=True, timeout=120
    )


def test_every_command_is_listed_with_a_line_and_has_its_help(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(cli.COMMANDS)
    assert all(len(line) <= 120 for line in listed)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_explains_itself(name: str):
    ran = run(sys.executable, "-m", "megatron_klear.cli", name, "--help")
    assert ran.returncode == 0, ran.stderr
    assert f"klear {name}" in ran.stdout


def test_listing_commands_imports_nothing_heavy():
    program = "import sys; from megatron_klear.cli import main; main(['--help']); print(*sys.modules)"
    modules = run(sys.executable, "-c", program).stdout.splitlines()[-1].split()
    assert not {"torch", "numpy", "pydantic", "transformers", "megatron"} & {name.partition(".")[0] for name in modules}


def test_a_wrong_command_names_the_nearest(capsys):
    assert cli.main(["serv"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["convert", "--out", "x"], ["convert", "--hf", "a", "--mcore", "b"]])
def test_convert_wants_one_direction(arguments: list[str], capsys):
    assert cli.main(arguments) == 2
    assert "--mcore" in capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_thin_over_a_command(path: Path):
    (name,) = [word for word in cli.COMMANDS if f'main(["{word}", *sys.argv[1:]])' in path.read_text()]
    assert find_spec(f"megatron_klear.cli.{cli.COMMANDS[name].module}")
    assert len(path.read_text().splitlines()) < 20


def test_every_command_has_a_script():
    started = {word for word in cli.COMMANDS for path in SCRIPTS if f'main(["{word}"' in path.read_text()}
    assert started == set(cli.COMMANDS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the scripts and the package without an environment, and a Python beside it that has no package."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "megatron_klear", folder / "megatron_klear", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__", "benchmark"))
    shutil.copy(ROOT / "pretrain_sft.py", folder)
    venv.create(folder.parent / "bare", symlinks=True)
    return folder


@pytest.fixture
def bare(checkout: Path) -> Path:
    return checkout.parent / "bare" / "bin" / "python"


@pytest.fixture
def environment(checkout: Path):
    """`.venv` in the checkout, with the packages of this Python."""
    folder = checkout / ".venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    yield folder
    shutil.rmtree(folder)


CLEAN = {"PYTHONPATH": None, "KLEAR_VENV": None, "RANK": None}


@pytest.mark.parametrize("script", ["pretrain_sft.py", "tools/prepare_data.py", "tools/verify.py"])
def test_a_script_enters_the_environment_and_says_so(checkout: Path, bare: Path, environment: Path, script: str):
    ran = run(bare, script, "--help", folder=checkout, **CLEAN)
    assert ran.returncode == 0, ran.stderr
    assert "klear" in ran.stdout + ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "going on with" in line]
    assert str(environment / "bin" / "python") in line


def test_interpreter_options_and_modules_survive(checkout: Path, bare: Path, environment: Path):
    ran = run(bare, "-W", "ignore", "-m", "megatron_klear.cli", "prepare", "--help", folder=checkout, **CLEAN)
    assert ran.returncode == 0, ran.stderr
    assert "usage: klear prepare" in ran.stdout


@pytest.mark.parametrize("venv", [None, "none"])
def test_without_an_environment_one_line_says_how_to_make_it(checkout: Path, bare: Path, venv: str | None):
    ran = run(bare, "pretrain_sft.py", "--help", folder=checkout, **CLEAN | {"KLEAR_VENV": venv})
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "bash examples/setup_env.sh" in ran.stderr
    assert "pydantic" in ran.stderr


def test_an_environment_without_the_packages_is_not_entered_again_and_again(checkout: Path, bare: Path):
    ran = run(bare, "pretrain_sft.py", folder=checkout, **CLEAN | {"KLEAR_VENV": str(bare.parent.parent)})
    assert ran.returncode == 2
    assert "going on with" in ran.stderr
    assert "bash examples/setup_env.sh" in ran.stderr


def test_the_doctor_runs_without_the_packages(checkout: Path, bare: Path):
    ran = run(bare, "tools/doctor.py", "--help", folder=checkout, **CLEAN)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("python", "code"), [(Path(sys.executable), 0), (None, 1)])
def test_scripts_take_the_active_python_where_no_environment_is_wanted(checkout: Path, python: Path | None, code: int):
    folder = (python or checkout.parent / "bare" / "bin" / "python").parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    script = f". '{ROOT}/examples/setup_env.sh' && command -v python"
    ran = run("bash", "-c", script, folder=checkout, **CLEAN | {"KLEAR_VENV": "none", "PATH": path})
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.strip() == (str(folder / "python") if code == 0 else "")
    assert ("lacks packages" in ran.stderr) == (code != 0)
