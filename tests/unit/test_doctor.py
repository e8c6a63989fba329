"""The doctor tells what is there, names what is broken and why, and goes on when a probe fails."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klear.data.tiny import TinyShape, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def doctor():
    return importlib.import_module("megatron_klear.cli.doctor")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package of the given files in front of everything installed, here and in processes of their own."""
    folder = tmp_path / "site"

    def write(**files: str) -> None:
        for name, text in files.items():
            path = folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in {p.name for p in folder.iterdir()}]:
            monkeypatch.delitem(sys.modules, name)

    return write


@pytest.fixture(scope="module")
def here(doctor):
    """What the command finds on this machine."""
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--json"]
    ran = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["can_start"]
    return {name: doctor.Finding(**finding) for name, finding in report["findings"].items()}


@pytest.fixture
def config(tmp_path):
    """A file of settings that can start here, and a function that adds lines to it."""
    write_tiny_model(tmp_path / "model", "qwen3", TinyShape(), weights=False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "response": "2"}\n')
    path = tmp_path / "run.toml"

    def write(**tables: str) -> Path:
        own = {
            "model": f'path = "{tmp_path / "model"}"\nweights = "random"',
            "data": f'train = ["{tmp_path / "rows.jsonl"}"]\nmax_length = 64\ntokens_per_microbatch = 64',
        }
        lines = [f'output = "{tmp_path / "run"}"']
        for name in own | tables:
            lines += [f"[{name}]", own.get(name, ""), tables.get(name, "")]
        path.write_text("\n".join(lines))
        return path

    return write


def test_a_failing_probe_is_told_and_the_others_go_on(doctor, capsys):
    def fails():
        raise OSError("libcudart.so.13: cannot open shared object file")

    findings = doctor.examine({"first": fails, "second": lambda: doctor.Finding(found="well")})
    assert findings["first"].status == "broken"
    assert "libcudart.so.13" in findings["first"].found
    assert findings["second"].found == "well"
    doctor.print_findings(findings)
    assert "libcudart.so.13" in capsys.readouterr().out


def test_every_probe_finds_something_here(doctor, here):
    assert here.keys() == doctor.PROBES.keys()
    assert {name for name in doctor.NEEDED if here[name].status != "ok"} == set()
    for name, finding in here.items():
        assert finding.found, name
        assert finding.status == "ok" or finding.instead, f"{name} is {finding.status}, and nothing said about it"


def test_a_missing_bubblewrap_is_absent_and_what_works_instead_is_told(doctor, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    finding = doctor.probe_sandbox()
    assert finding.status == "absent"
    assert "apt-get install bubblewrap" in finding.found
    assert "landlock" in finding.instead or "cannot be used" in finding.instead


def test_another_project_called_apex_is_not_taken_for_nvidia_apex(doctor, install):
    install(apex__forms="")
    finding = doctor.probe_apex()
    assert finding.status == "broken"
    assert "not NVIDIA Apex" in finding.found
    assert "pip uninstall apex" in finding.instead


def test_apex_without_its_extensions_is_broken(doctor, install):
    install(apex__optimizers="class FusedAdam: ...")
    finding = doctor.probe_apex()
    assert finding.status == "broken"
    assert "without its extensions" in finding.found
    assert "amp_C" in finding.found


def test_apex_with_its_extensions_is_well(doctor, install):
    install(apex__optimizers="class FusedAdam: ...", amp_C__kernels="")
    assert doctor.probe_apex().status == "ok"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", "undefined symbol: _ZN3c104cuda"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
    ],
)
def test_a_package_that_does_not_import_is_broken_not_absent(doctor, install, text, told):
    install(transformer_engine__pytorch=text)
    finding = doctor.probe_transformer_engine()
    assert finding.status == "broken"
    assert told in finding.found


def test_a_missing_dependency_is_named(doctor, monkeypatch):
    installed = doctor.importlib.metadata.version

    def version(name):
        if name == "pyarrow":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "rich" else installed(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    finding = doctor.probe_dependencies()
    assert finding.status == "broken"
    assert "pyarrow>=18 is missing" in finding.found
    assert "rich>=13, and 0.1 is installed" in finding.found


def test_a_gpu_that_torch_does_not_see_is_broken(doctor, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_and_gpus", lambda: ["570.10, NVIDIA H200"])
    finding = doctor.probe_gpus()
    assert finding.status == "broken"
    assert "570.10, NVIDIA H200" in finding.found


def test_a_run_that_can_start_has_no_problem(doctor, here, config):
    assert doctor.config_problems(config(), here) == []


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"model": 'attention = "flash"', "parallel": 'device = "cpu"'}, "model.attention"),
        ({"model": 'fp8 = "hybrid"\ntransformer_engine = "off"'}, "model.transformer_engine is off"),
        ({"data": 'validation = ["absent/*.jsonl"]'}, "no file matches absent/*.jsonl"),
        ({"parallel": "tensor = 64"}, "parallel.tensor 64 does not divide"),
        ({"modle": "x = 1"}, "did you mean model"),
        ({"data": "max_length = ["}, "run.toml"),
    ],
)
def test_what_a_run_lacks_is_named(doctor, here, config, tables, told):
    problems = doctor.config_problems(config(**tables), here)
    assert any(told in problem for problem in problems), problems


def test_a_package_that_does_not_import_does_not_count_for_a_run(doctor, here, config):
    broken = here | {"transformer-engine": doctor.Finding(status="broken", found="2.9: undefined symbol")}
    problems = doctor.config_problems(config(model='transformer_engine = "on"'), broken)
    assert any("needs transformer-engine" in problem for problem in problems), problems


def test_the_exit_code_and_the_report_say_whether_the_run_can_start(doctor, here, config, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: here)
    assert doctor.main(["--config", str(config())]) == 0
    assert "nothing is missing here" in capsys.readouterr().out
    lacking = str(config(model='transformer_engine = "on"', parallel='device = "cpu"'))
    assert doctor.main(["--config", lacking]) == 1
    assert "model.transformer_engine" in capsys.readouterr().out
    assert doctor.main(["--json", "--config", lacking]) == 1
    assert "model.transformer_engine" in json.loads(capsys.readouterr().out)["problems"][0]


def test_without_something_needed_no_run_can_start(doctor, here, monkeypatch, capsys):
    broken = doctor.Finding(status="broken", found="0.16.1: ImportError", instead="install it again")
    monkeypatch.setattr(doctor, "examine", lambda: here | {"Megatron-Core": broken})
    assert doctor.main([]) == 1
    assert "!!  Megatron-Core" in capsys.readouterr().out
