"""The doctor reports on any machine, tells NVIDIA's Apex from its namesake, and judges a run's settings."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from megatron_klear.data.tiny import TinyShape, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def doctor(monkeypatch):
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "tools" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "doctor", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_config(tmp_path):
    """A run that can start: its settings file and the model folder beside it."""
    model = tmp_path / "model"
    write_tiny_model(model, "qwen3", TinyShape(), weights=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "response": "a"}\n')
    path = tmp_path / "run.toml"
    path.write_text(
        f'output = "{tmp_path}/run"\n[model]\npath = "{model}"\nweights = "random"\n[data]\ntrain = ["{rows}"]\n'
    )
    return path


def a_module(folder: Path, name: str, text: str = "") -> None:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(text)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_json_report_of_this_machine():
    shown = subprocess.run(
        [sys.executable, "tools/doctor.py", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = {finding["name"]: finding for finding in json.loads(shown)["findings"]}
    assert found["megatron-core"]["detail"] == metadata.version("megatron-core")
    assert found["torch"]["state"] == "ok"
    assert {"GPU", "NVIDIA Apex", "vLLM", "transformer-engine", "nvcc", "compiled extension"} <= set(found)


def test_apex_of_the_package_index_is_not_taken_for_nvidias(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.find_apex().state == "absent"
    monkeypatch.undo()
    a_module(tmp_path, "apex")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    found = doctor.find_apex()
    assert found.state == "broken"
    assert "apex.optimizers and amp_C" in found.detail


def test_nvidias_apex_is_known_by_its_extensions(doctor, monkeypatch):
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", None)
    found = doctor.find_apex()
    assert found.state == "ok"
    assert "no gradient accumulation fusion" in found.detail


def test_a_package_that_does_not_import_is_a_line_of_the_report(doctor, tmp_path, monkeypatch):
    a_module(tmp_path, "flash_attn_of_another_build", 'raise OSError("undefined symbol: xyz")')
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.find_optional("FlashAttention", "flash_attn_of_another_build", "flash-attn", "SDPA")
    assert found.state == "broken"
    assert "undefined symbol: xyz" in found.detail
    assert found.detail.endswith("SDPA")


def test_a_probe_that_fails_does_not_end_the_report(doctor, monkeypatch):
    def find_trouble():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "PROBES", (find_trouble, doctor.find_python))
    trouble, python = doctor.examine()
    assert trouble.name == "find_trouble"
    assert "boom" in trouble.detail
    assert python.name == "Python"


def test_dependencies_against_the_project(doctor, tmp_path):
    found = by_name(doctor.find_dependencies())
    assert set(found) == {"dependencies"}
    assert found["dependencies"].state == "ok"
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["no-such-package-at-all>=1", "numpy>=1000", "numpy>=1.0"]\n')
    found = by_name(doctor.find_dependencies(project))
    assert found["dependencies"].detail == "1 of 3 required packages fit"
    assert found["no-such-package-at-all"].state == "missing"
    assert "pip install 'numpy>=1000'" in found["numpy"].detail


def test_a_run_that_could_start(doctor, run_config, capsys):
    assert doctor.main(["--config", str(run_config)]) == 0
    assert "This run could start here." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (["--model.weights", "pretrained"], "safetensors"),
        (["--data.train", "nowhere.jsonl"], "data.train"),
        (["--parallel.pipeline", "3"], "parallel.pipeline"),
        (["--optimizer.learning_rat", "1"], "optimizer.learning_rate"),
        (["--model.path", "nowhere"], "nowhere"),
        (["--model.attention", "flash", "--parallel.device", "cpu"], "model.attention"),
    ],
)
def test_what_a_run_lacks_is_named(doctor, run_config, capsys, override, named):
    assert doctor.main(["--json", "--config", str(run_config), *override]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any(named in problem for problem in problems)


def test_overrides_without_a_config_are_refused(doctor, capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--parallel.tensor", "2"])
    assert stopped.value.code == 2
    assert "--config" in capsys.readouterr().err
