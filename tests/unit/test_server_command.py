"""A server's command line and environment, what is refused before it is started, and the tool that starts them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from engine_on_fakes import FakeCourier

from megatron_klear.config.checks_rollout import Served, check_rollout, check_servers
from megatron_klear.config.read import load
from megatron_klear.config.rl import GPPOConfig
from megatron_klear.config.start import start_gppo
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.models.architecture import read_architecture
from megatron_klear.rollout.servers.command import ServerCommand, run_commands
from megatron_klear.rollout.servers.guard import RequireKey
from megatron_klear.rollout.vllm.engine import VLLMEngine
from megatron_klear.rollout.vllm.open import open_vllm

ROOT = Path(__file__).resolve().parents[2]
TOML = """
output = "{folder}/run"
[model]
path = "{folder}/model"
weights = "random"
[parallel]
device = "cpu"
[prompts]
max_tokens = 64
sources = [{{ generator = "arithmetic", count = 40 }}]
[sampling]
max_tokens = 192
[rollout]
kind = "vllm"
[rollout.server]
python = "{folder}/env/bin/python"
"""
FAKE_PYTHON = """#!/bin/sh
exec {python} {fake} "$@"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose vLLM is the fake server."""
    monkeypatch.delenv("KLEAR_ROLLOUT_API_KEY", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_tiny_model(tmp_path / "model", "qwen3", TinyShape(head_dim=32), weights=False)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(python=sys.executable, fake=ROOT / "tests" / "fake_server.py"))
    python.chmod(0o755)
    (tmp_path / "run.toml").write_text(TOML.format(folder=tmp_path))
    return tmp_path


def settings(folder: Path, *flags: str) -> GPPOConfig:
    return load(GPPOConfig, ["--config", str(folder / "run.toml"), *flags])


def commands(folder: Path, *flags: str, ports: tuple[int, ...] = (8000,)) -> list[ServerCommand]:
    config = settings(folder, *flags)
    key = os.environ.get(config.rollout.api_key_variable)
    served = Served.by(config, read_architecture(config.model.path))
    return run_commands(config.rollout, served, list(ports), api_key=key)


def option(command: ServerCommand, name: str) -> str:
    return command.arguments[command.arguments.index(name) + 1]


def problems(folder: Path, *flags: str) -> str:
    config = settings(folder, *flags)
    return "\n".join(check_servers(config, read_architecture(config.model.path)))


GPU = ("--rollout.server.device", "cuda")


def test_a_server_on_the_cpu(folder: Path):
    (command,) = commands(folder)
    assert command.arguments[:3] == (str(folder / "env/bin/python"), "-m", "vllm.entrypoints.openai.api_server")
    assert option(command, "--model") == str(folder / "model")
    assert option(command, "--dtype") == "bfloat16"
    assert option(command, "--max-model-len") == str(64 + 192 + 1)
    assert option(command, "--kv-cache-memory-bytes") == str(2**30)
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert option(command, "--generation-config") == "vllm"
    assert json.loads(option(command, "--weight-transfer-config")) == {"backend": "klear_file"}
    assert "--enforce-eager" in command.arguments
    assert "--no-enable-chunked-prefill" in command.arguments
    assert not {"--gpu-memory-utilization", "--enable-sleep-mode", "--middleware"} & set(command.arguments)
    assert command.variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "CUDA_VISIBLE_DEVICES" not in command.variables
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in command.variables
    assert command.address == "http://127.0.0.1:8000"


def test_servers_on_gpus_share_them_out(folder: Path, monkeypatch: pytest.MonkeyPatch):
    flags = (*GPU, "--rollout.server.count", "2", "--rollout.server.tensor_parallel", "2")
    taken = [c.variables["CUDA_VISIBLE_DEVICES"] for c in commands(folder, *flags, ports=(1, 2))]
    assert taken == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    taken = [c.variables["CUDA_VISIBLE_DEVICES"] for c in commands(folder, *flags, ports=(1, 2))]
    assert taken == ["4,5", "6,7"]
    told = commands(folder, *flags, "--rollout.server.devices", "[3, 2, 1, 0]", ports=(1, 2))
    assert [c.variables["CUDA_VISIBLE_DEVICES"] for c in told] == ["3,2", "1,0"]
    assert option(told[0], "--gpu-memory-utilization") == "0.9"
    assert "--enforce-eager" not in told[0].arguments


@pytest.mark.parametrize(
    ("transfer", "backend"), [("disk", "klear_file"), ("cuda_ipc", "klear_ipc"), ("nccl", "klear_nccl")]
)
def test_each_transfer_has_its_backend(folder: Path, transfer: str, backend: str):
    flags = ("--rollout.transfer", transfer, "--rollout.transfer_folder", str(folder))
    (command,) = commands(folder, *GPU, *flags)
    assert json.loads(option(command, "--weight-transfer-config")) == {"backend": backend}
    same_card = transfer == "cuda_ipc"
    assert ("--enable-sleep-mode" in command.arguments) == same_card
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in command.variables) == same_card


def test_a_folder_without_weights_is_not_read_for_them(folder: Path):
    assert option(commands(folder)[0], "--load-format") == "dummy"
    (folder / "model" / "model.safetensors").touch()
    assert option(commands(folder)[0], "--load-format") == "dummy"
    assert option(commands(folder, "--model.weights", "pretrained")[0], "--load-format") == "auto"


def test_the_longest_sequence_may_fill_the_model(folder: Path):
    assert option(commands(folder, "--sampling.max_tokens", str(4096 - 64))[0], "--max-model-len") == "4096"
    with open(folder / "run.toml", "a") as file:
        file.write('[validation]\nsources = [{ generator = "arithmetic" }]\n')
    held_out = ("--validation.sampling.max_tokens", "300")
    assert option(commands(folder, *held_out)[0], "--max-model-len") == str(64 + 300 + 1)


def test_own_arguments_come_last(folder: Path):
    (command,) = commands(folder, "--rollout.server.arguments", '["--max-num-seqs", "3"]')
    assert command.arguments[-2:] == ("--max-num-seqs", "3")


def test_the_trainers_processes_are_hidden_from_servers(folder: Path):
    (command,) = commands(folder)
    inherited = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/else", "PATH": "/bin", "HOME": "/home/me"}
    environment = command.environment(inherited)
    assert environment["PYTHONPATH"] == str(ROOT)
    assert environment["PATH"] == f"{folder}/env/bin:/bin"
    assert environment["HOME"] == "/home/me"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()


def test_a_key_travels_in_the_environment_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLEAR_ROLLOUT_API_KEY", "sesame")
    (command,) = commands(folder)
    assert "sesame" not in command.shown()
    assert "sesame" not in " ".join(command.arguments)
    assert option(command, "--middleware").endswith("RequireKey")
    environment = command.environment(dict(os.environ))
    assert environment["VLLM_API_KEY"] == "sesame"
    assert "KLEAR_ROLLOUT_API_KEY" not in environment


@pytest.mark.parametrize("own", ["", "sesame"])
def test_servers_of_the_run_want_a_key_that_only_the_run_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, own: str
):
    monkeypatch.setenv("FAKE_SERVER_PIDS", str(folder / "pids"))
    if own:
        monkeypatch.setenv("KLEAR_ROLLOUT_API_KEY", own)
    config = settings(folder)

    def opened() -> VLLMEngine:
        return open_vllm(
            config.rollout,
            Served.by(config, read_architecture(config.model.path)),
            FakeCourier(),
            decode=str,
            stop_token_ids=[1],
            logs=config.output / "servers",
        )[0]

    keys = set()
    for _ in range(2):
        with closing(opened()) as engine:
            (note,) = [note for note in (folder / "pids").iterdir() if _runs(note)]
            process = Path("/proc") / note.read_text().split()[0]
            environment = dict(line.split("=", 1) for line in (process / "environ").read_text().split("\0") if line)
            key = environment["VLLM_API_KEY"]
            assert engine._fleet.members[0].client._headers == {"Authorization": f"Bearer {key}"}
            assert key not in (process / "cmdline").read_text()
            assert "RequireKey" in (process / "cmdline").read_text()
            assert "KLEAR_ROLLOUT_API_KEY" not in environment
            assert key not in (folder / "run/servers/server-0.log").read_text()
            assert key not in caplog.text
            assert key == own if own else len(key) > 40
            assert os.environ.get("KLEAR_ROLLOUT_API_KEY", "") == own, "workers would inherit it"
            keys.add(key)
    assert len(keys) == (1 if own else 2)
    assert "sesame" not in repr(commands(folder))


def _runs(note: Path) -> bool:
    return (Path("/proc") / note.read_text().split()[0]).exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "node1", "10.0.0.3"])
def test_an_open_interface_needs_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str):
    flags = ("--rollout.server.host", host)
    assert "KLEAR_ROLLOUT_API_KEY" in problems(folder, *flags)
    monkeypatch.setenv("KLEAR_ROLLOUT_API_KEY", "sesame")
    assert problems(folder, *flags) == ""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--rollout.server.python", "nowhere/bin/python"), "bash tools/make_vllm_env.sh nowhere"),
        (("--sampling.max_tokens", "4096"), "max_position_embeddings 4096"),
        (("--rollout.transfer", "nccl"), "rollout.transfer = nccl needs servers on GPUs"),
        (("--rollout.server.kv_cache_gib", "0.0001"), "rollout.server.kv_cache_gib 0.0001 does not hold one sequence"),
        (("--rollout.server.port", "65535", "--rollout.server.count", "2"), "leaves no ports"),
        ((*GPU, "--rollout.server.devices", "[0]", "--rollout.server.count", "2"), "devices names 1 GPUs"),
        ((*GPU, "--rollout.server.tensor_parallel", "3"), "does not divide the model's num_attention_heads 4"),
    ],
)
def test_what_cannot_work_is_told_before_the_start(folder: Path, flags: tuple[str, ...], told: str):
    assert problems(folder) == ""
    assert told in problems(folder, *flags)


def test_a_head_size_that_vllm_does_not_compute_is_told(folder: Path):
    write_tiny_model(folder / "model", "qwen3", TinyShape(head_dim=16), weights=False, force=True)
    assert "head_dim 16" in problems(folder)
    assert "head_dim" not in problems(folder, *GPU)


def test_the_trainer_refuses_servers_that_it_cannot_start(folder: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--config", str(folder / "run.toml"), "--train.tokens_per_microbatch", "256"]
    start_gppo(flags)
    missing = ["--rollout.server.python", "nowhere/bin/python"]
    with pytest.raises(SystemExit, match="2"):
        start_gppo([*flags, *missing])
    assert "tools/make_vllm_env.sh" in capsys.readouterr().err
    config = settings(folder, *missing, "--rollout.servers", '["http://else:1"]')
    assert check_rollout(config, read_architecture(config.model.path), 1) == []


def placement(folder: Path, *flags: str, world_size: int = 4, gpu_bytes: int | None = None) -> str:
    """What is said of a run that trains on GPUs."""
    config = settings(folder, *GPU, "--parallel.device", "cuda", *flags)
    return "\n".join(check_rollout(config, read_architecture(config.model.path), world_size, gpu_bytes=gpu_bytes))


APART = ("--rollout.server.devices", "[4, 5]", "--rollout.server.count", "2")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--rollout.transfer", "nccl"), "GPUs 0 are the trainer's too"),
        (("--rollout.transfer", "nccl", "--rollout.server.devices", "[3]"), "GPUs 3 are the trainer's too"),
        (("--rollout.transfer", "nccl", *APART), ""),
        (("--rollout.transfer", "cuda_ipc", *APART), "some on 4, 5"),
        (("--rollout.transfer", "cuda_ipc", "--rollout.server.count", "4"), ""),
        (("--rollout.transfer", "cuda_ipc", "--rollout.mode", "asynchronous"), "neither ever gives its memory"),
        (("--rollout.transfer", "cuda_ipc", "--rollout.mode", "one_step_off"), "neither ever gives its memory"),
        ((), "devices is not set, and the servers would take the trainer's GPUs 0"),
        (("--rollout.server.devices", "[0]", "--rollout.server.memory_share", "0.3"), ""),
        (APART, ""),
    ],
)
def test_servers_and_trainer_on_cards_that_cannot_be_are_told(folder: Path, flags: tuple[str, ...], told: str):
    said = placement(folder, *flags)
    assert told in said if told else said == ""


def test_cards_are_told_apart_by_their_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    nccl = ("--rollout.transfer", "nccl", "--rollout.server.devices")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert placement(folder, *nccl, "[0]") == ""
    assert "GPUs 5 are" in placement(folder, *nccl, "[5]")
    assert placement(folder, *nccl, "[5]", world_size=1) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert placement(folder, *nccl, "[5]") == "", "the other ranks are on other machines"


def test_servers_of_others_are_judged_by_mode_and_transfer_alone(folder: Path):
    others = ("--rollout.servers", '["http://else:1"]', "--rollout.transfer")
    assert placement(folder, *others, "nccl") == ""
    assert "neither ever" in placement(folder, *others, "cuda_ipc", "--rollout.mode", "asynchronous")
    assert "parallel.device is cpu" in placement(folder, *others, "nccl", "--parallel.device", "cpu")


def test_a_local_cache_that_no_device_holds_is_told(folder: Path):
    text = (folder / "run.toml").read_text().partition("[rollout]")[0]
    (folder / "run.toml").write_text(text.replace('device = "cpu"', "") + "[rollout]\nmax_sequences = 64\n")
    shape = read_architecture(folder / "model")
    row_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    weights = 2 * shape.num_parameters

    def said(gpu_bytes: int | None, *flags: str, world_size: int = 1) -> str:
        config = settings(folder, *flags)
        return "\n".join(check_rollout(config, shape, world_size, gpu_bytes=gpu_bytes))

    eight = ("--algorithm.prompts_per_step", "8", "--algorithm.prompts_per_update", "8")
    eight += ("--sampling.samples_per_prompt", "4")
    huge = ("--sampling.max_tokens", str(10**12), "--train.tokens_per_microbatch", str(2 * 10**12))
    need = weights + 32 * 192 * row_bytes
    assert said(need, *eight) == ""
    assert "the cache of 32 sequences" in said(need - 1, *eight)
    assert said(need - 1, *eight, world_size=2) == "", "each process draws its share"
    assert said(need - 1, *eight, "--rollout.max_sequences", "31") == ""
    assert "lower rollout.max_sequences" in said(None, *eight, *huge)
    assert said(None, *eight, "--parallel.device", "cuda", *huge) == ""


@pytest.mark.parametrize(
    ("path", "headers", "passes"),
    [
        ("/health", [], True),
        ("/update_weights", [], False),
        ("/collective_rpc", [(b"authorization", b"Bearer wrong")], False),
        ("/collective_rpc", [(b"Authorization", b"Bearer sesame")], True),
        ("/health/../pause", [], False),
        ("/pause", [(b"authorization", b"sesame")], False),
        ("/pause", [(b"authorization", b"Bearer sesame"), (b"authorization", b"Bearer wrong")], False),
    ],
)
def test_the_guard_asks_for_the_key(monkeypatch: pytest.MonkeyPatch, path: str, headers: list, passes: bool):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    reached, sent = [], []

    async def app(scope: object, receive: object, send: object) -> None:
        reached.append(scope)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, None, send))
    assert bool(reached) == passes
    assert passes or sent[0]["status"] == 401


def test_a_guard_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="VLLM_API_KEY"):
        RequireKey(None)


def tool(folder: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "tools/serve_rollouts.py", "--config", str(folder / "run.toml"), *flags],
        env={**os.environ, "FAKE_SERVER_PIDS": str(folder / "pids")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_tool_serves_until_it_is_told_to_end(folder: Path):
    run = tool(folder, "--rollout.server.count", "2")
    assert run.stdout
    lines = []
    while not lines or not lines[-1].startswith("servers = "):
        lines.append(run.stdout.readline())
        assert lines[-1], "".join(lines)
    assert len(json.loads(lines[-1].removeprefix("servers = "))) == 2
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=30)[0] == "ending the servers\n"
    assert run.returncode == 0
    pids = [int(pid) for note in (folder / "pids").iterdir() for pid in note.read_text().split()[:2]]
    assert len(pids) == 4
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_tool_shows_commands_without_starting_them(folder: Path):
    run = tool(folder, "--print-command", "--rollout.server.port", "31999")
    shown = run.communicate(timeout=60)[0]
    assert run.returncode == 0, shown
    assert "--port 31999" in shown
    assert not (folder / "pids").exists()
