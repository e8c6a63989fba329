"""What the environment says before CUDA starts: Megatron's rule of one connection, and where it does not hold."""

import json
import os
import subprocess
import sys

import pytest
from tiny_run import write_run

from megatron_klear.config.base import ParallelConfig
from megatron_klear.config.launch import CONNECTIONS, prepare_environment, smallest_capability, smallest_gpu_bytes


@pytest.mark.parametrize(
    ("parallel", "capability", "value"),
    [
        ({"tensor": 2}, 9.0, "1"),
        ({"context": 2}, 8.0, "1"),
        ({"tensor": 2}, 10.0, None),
        ({"context": 4}, 12.1, None),
        ({"tensor": 2, "device": "cpu"}, 9.0, None),
        ({"pipeline": 2}, 9.0, None),
    ],
)
def test_one_connection_where_tensor_or_context_ranks_overlap(parallel, capability: float, value: str | None):
    environ: dict[str, str] = {}
    assert prepare_environment(ParallelConfig(**parallel), environ, capability) == []
    assert environ.get(CONNECTIONS) == value


def test_a_value_of_the_user_stands_and_is_told():
    environ = {CONNECTIONS: "8"}
    (warning,) = prepare_environment(ParallelConfig(tensor=2), environ, 9.0)
    assert environ == {CONNECTIONS: "8"}
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 8" in warning
    assert "parallel.tensor 2" in warning
    assert prepare_environment(ParallelConfig(tensor=2), {CONNECTIONS: "1"}, 9.0) == []
    assert prepare_environment(ParallelConfig(tensor=2), environ, 10.3) == []


def test_the_driver_is_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in *compute_cap*) printf "10.0\\n9.0\\n";; *) printf "81559\\n46068\\n";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert smallest_capability() == 9.0
    assert smallest_gpu_bytes() == 46068 * 2**20
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert smallest_capability() is None
    environ: dict[str, str] = {}
    prepare_environment(ParallelConfig(tensor=2), environ)
    assert environ == {CONNECTIONS: "1"}  # nobody knows the card: Megatron's rule


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_entry_sets_it_before_torch_is_imported(tmp_path, tensor: int):
    """A whole start in a process of its own, as one rank of two."""
    toml = write_run(tmp_path, weights=True)
    code = (
        "import json, os, sys; from megatron_klear.config.start import start_sft; "
        "before = 'torch' in sys.modules; start_sft(sys.argv[1:]); "
        "print(json.dumps([before, 'torch' in sys.modules, os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS')]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != CONNECTIONS} | {"WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-c", code, "--config", str(toml), "--parallel.tensor", str(tensor)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.splitlines()[-1]) == [False, False, None if tensor == 1 else "1"]
