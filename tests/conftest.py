"""Fixtures shared by all tests."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sandboxes
import vllm_server as vllm_server_module
from pool import Pool
from vllm_server import RunningServer

from megatron_klear.rewards.sandbox import Sandbox, open_sandbox

# What a busy machine takes for an example says nothing of the code.
hypothesis.settings.register_profile("klear", deadline=None)
hypothesis.settings.load_profile("klear")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=sandboxes.KINDS)
def slot(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of either kind, for the tests of a file."""
    sandbox = open_sandbox(request.param)
    yield sandbox
    sandbox.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip by name what this machine lacks; the slow tests come last, or first where workers share them out."""
    shared_out = hasattr(config, "workerinput")
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None) != shared_out)
    absent = {}
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            absent["gpu"] = "no CUDA device"
    if reason := vllm_server_module.why_absent():
        absent["vllm"] = reason
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


# Files whose tests share the session's vLLM server, and long ones that workers share out by what they are about.
_ON_ONE_SERVER = re.compile(r"test_vllm_(server|weights)\.py|test_graded_text\.py.*\[vllm")
_EMULATED = "tests/te/test_te_"  # share the session's pools, whose start takes seconds
_SHARED_OUT = re.compile(r"(.*/test_(?:rollout_kills|layouts)\.py).*?(\[\w+|_vllm_)")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker of `pytest -n` whole files, in the order of collection, but for the kinds above."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if _ON_ONE_SERVER.search(nodeid):
                return "vLLM server"
            if _EMULATED in nodeid:
                return "transformer-engine"
            shared_out = _SHARED_OUT.match(nodeid)
            return "".join(shared_out.groups()) if shared_out else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real data, which a plain clone does not have."""
    folder = Path(os.environ.get("KLEAR_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"shared data is absent: no {folder} (set KLEAR_SHARED to the folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Run `function(*args)` on several gloo ranks: `ranks(world_size, function, *args)` -> results by rank."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real vLLM server on the CPU, fp32, untied; for tests marked `vllm`. Weights are those of the last test."""
    with vllm_server_module.running_server(tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="session")
def tied_vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The same with a model whose head is its embeddings."""
    folder = tmp_path_factory.mktemp("tied_vllm")
    with vllm_server_module.running_server(folder, vllm_server_module.TIED_SHAPE) as server:
        yield server
