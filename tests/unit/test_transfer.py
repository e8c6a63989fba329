"""Weights sent as files: all of them arrive, one bucket at a time, no file stays behind, failures are named."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from aiohttp import web
from fake_receiver import FakeReceiver, Receivers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_klear.config.rollout import VLLMRolloutConfig
from megatron_klear.errors import UserError
from megatron_klear.rollout.vllm.client import ServerError
from megatron_klear.rollout.weights.base import FileTransport, TransferFailed, open_transport
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.rollout.weights.files import BucketFolder

PHASES = [
    *("klear_begin_update", "start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"),
    "klear_checksums",
]


@pytest.fixture
def receivers():
    receivers = Receivers()
    yield receivers
    receivers.close()


def transport_in(folder: Path, *, bucket_bytes: int = 4000, timeout_seconds: float = 20.0, **options) -> FileTransport:
    return FileTransport(
        BucketFolder(folder, durable=False),
        dtype=options.get("dtype", torch.float32),
        bucket_bytes=bucket_bytes,
        timeout_seconds=timeout_seconds,
    )


def some_weights(sizes: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(size, 3, generator=generator) for i, size in enumerate(sizes)}


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=9),
    bucket_bytes=st.integers(1, 20_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_tensor_arrives_in_the_servers_precision(receivers, tmp_path, sizes, bucket_bytes, dtype):
    fakes = [FakeReceiver(), FakeReceiver(workers=2)]
    servers = [receivers.add(fake) for fake in fakes]
    transport = transport_in(tmp_path, bucket_bytes=bucket_bytes, dtype=dtype)
    weights = some_weights(sizes)
    expected = {name: checksum(tensor.to(dtype)) for name, tensor in weights.items()}
    held = transport.send(weights.items(), 7, servers, receivers.portal)
    first, second = (server.url for server in servers)
    assert held == {f"{first} worker 0": expected, f"{second} worker 0": expected, f"{second} worker 1": expected}
    assert all(torch.equal(fakes[0].loaded[name], tensor.to(dtype)) for name, tensor in weights.items())
    assert files_below(tmp_path) == []
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_phases_come_in_order_and_buckets_keep_their_size(receivers, tmp_path):
    fake = FakeReceiver()
    server = receivers.add(fake)
    sizes: list[int] = []
    names: list[str] = []

    def look(name, _):
        if name == "update_weights":
            (path,) = files_below(tmp_path)
            sizes.append(path.stat().st_size)
            names.append(path.name)

    fake.fault = look
    transport = transport_in(tmp_path, bucket_bytes=4000)
    receivers.portal.run(transport.attach([server]))
    weights = some_weights([300, 30, 1000, 20, 20, 250])
    transport.send(weights.items(), 3, [server], receivers.portal)
    updates = ["update_weights"] * 3
    assert fake.routes == ["klear_describe", "init_weight_transfer_engine", *PHASES[:2], *updates, *PHASES[3:]]
    payloads = [3600 + 360, 12_000, 240 + 240 + 3000]  # a tensor larger than a bucket goes alone
    assert [size - sizes[0] for size in sizes] == [payload - payloads[0] for payload in payloads]
    assert len(set(names)) == len(names)
    finish = dict(fake.calls)["finish_weight_update"]
    assert finish == {"weight_version": "3"}
    transport.close()


def test_one_bucket_and_one_tensor_are_held_at_most(receivers, tmp_path):
    server = receivers.add(FakeReceiver())
    numel, alive, peak = 25_000, weakref.WeakSet(), 0  # 100 kB each
    on_disk = []

    def weights():
        nonlocal peak
        for index in range(40):
            tensor = torch.full((numel,), float(index))
            alive.add(tensor)
            peak = max(peak, len(alive))
            on_disk.append(sum(path.stat().st_size for path in files_below(tmp_path)))
            yield f"w{index}", tensor
            del tensor

    transport = transport_in(tmp_path, bucket_bytes=1_000_000)
    transport.send(weights(), 1, [server], receivers.portal)
    transport.close()
    assert peak <= 2  # the one just made and the one just written
    assert max(on_disk) <= 1_000_000 + 400_000  # of 4 MB, with the file's header


@pytest.mark.parametrize("phase", PHASES)
def test_a_server_that_fails_is_named_and_the_others_get_everything(receivers, tmp_path, phase):
    good, bad = FakeReceiver(), FakeReceiver()
    servers = [receivers.add(bad), receivers.add(good)]

    def fault(name, fake):
        if name == phase and (phase != "update_weights" or fake.routes.count(phase) == 2):
            raise web.HTTPInternalServerError(text="out of memory on the card")

    bad.fault = fault
    transport = transport_in(tmp_path)
    weights = some_weights([300, 300, 300, 300])
    left = iter(weights.items())
    with pytest.raises(TransferFailed, match="out of memory on the card") as raised:
        transport.send(left, 5, servers, receivers.portal)
    failed, fine = (server.url for server in servers)
    assert list(raised.value.failures) == [failed]
    assert phase.removeprefix("klear_").split("_")[0] in raised.value.failures[failed]
    assert raised.value.checksums == {f"{fine} worker 0": {name: checksum(t) for name, t in weights.items()}}
    assert next(left, None) is None
    assert files_below(tmp_path) == []
    bad.fault = None
    held = transport.send(weights.items(), 6, servers, receivers.portal)
    assert len(held) == 2
    transport.close()


def test_a_server_that_keeps_its_prefix_cache_is_named(receivers, tmp_path):
    fake = FakeReceiver()
    server = receivers.add(fake)
    fake.clears_cache = False
    transport = transport_in(tmp_path)
    with pytest.raises(TransferFailed, match="cache of the old weights") as raised:
        transport.send(some_weights([3]).items(), 1, [server], receivers.portal)
    assert list(raised.value.failures) == [server.url]
    transport.close()


def test_a_server_that_hangs_or_is_gone_costs_a_bounded_time(receivers, tmp_path):
    hung, gone = FakeReceiver(), FakeReceiver()
    servers = [receivers.add(hung), receivers.add(gone)]
    hung.fault = lambda name, _: asyncio.sleep(60) if name == "update_weights" else None
    receivers.portal.run(gone.stop())
    transport = transport_in(tmp_path, timeout_seconds=0.5)
    with pytest.raises(TransferFailed) as raised:
        transport.send(some_weights([300, 300]).items(), 1, servers, receivers.portal)
    assert "nothing within" in raised.value.failures[servers[0].url]
    assert servers[1].url in raised.value.failures
    assert raised.value.checksums == {}
    assert files_below(tmp_path) == []
    transport.close()


def test_a_full_disk_gives_the_update_up_and_says_what_to_do(receivers, tmp_path):
    fake = FakeReceiver()
    server = receivers.add(fake)
    transport = transport_in(tmp_path, bucket_bytes=1_000_000)
    weights = iter(some_weights([20, 50_000, 50_000]).items())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(TransferFailed, match=r"rollout\.bucket_bytes"):
            transport.send(weights, 1, [server], receivers.portal)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert next(weights, None) is None
    assert "finish_weight_update" not in fake.routes
    assert files_below(tmp_path) == []
    transport.close()


def test_weights_that_break_off_leave_no_file(receivers, tmp_path):
    def weights():
        yield from some_weights([30]).items()
        raise RuntimeError("gathering failed")

    transport = transport_in(tmp_path)
    with pytest.raises(RuntimeError, match="gathering failed"):
        transport.send(weights(), 1, [receivers.add(FakeReceiver())], receivers.portal)
    assert files_below(tmp_path) == []
    transport.close()


def test_other_ranks_only_take_part_in_gathering(tmp_path):
    config = VLLMRolloutConfig(transfer="disk", transfer_folder=tmp_path)
    transport = open_transport(config, dtype=torch.float32, device=torch.device("cpu"), rank=1, world_size=2)
    weights = iter(some_weights([3, 3]).items())
    assert transport.send(weights, 1, (), None) == {}
    assert next(weights, None) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("described", "said"),
    [({"dtype": "bfloat16"}, "dtype bfloat16"), ({"backend": "klear_nccl"}, "backend klear_nccl")],
)
def test_a_server_of_other_settings_is_refused(receivers, tmp_path, described, said):
    fake = FakeReceiver()
    fake.description |= described
    transport = transport_in(tmp_path)
    with pytest.raises(UserError, match=said):
        receivers.portal.run(transport.attach([receivers.add(fake)]))
    transport.close()


def test_a_server_without_the_extension_is_told_what_it_lacks(receivers, tmp_path):
    fake = FakeReceiver()
    server = receivers.add(fake)

    def refuse(name, _):
        raise web.HTTPNotFound(text="no such route")

    fake.fault = refuse
    transport = transport_in(tmp_path)
    with pytest.raises(UserError, match="--worker-extension-cls"):
        receivers.portal.run(transport.attach([server]))
    receivers.portal.run(fake.stop())
    with pytest.raises(ServerError):
        receivers.portal.run(transport.attach([server]))
    transport.close()


def test_servers_are_attached_once_and_anew_after_they_went_away(receivers, tmp_path):
    fake = FakeReceiver()
    server = receivers.add(fake)
    transport = transport_in(tmp_path)
    for _ in range(2):
        receivers.portal.run(transport.attach([server]))
    assert fake.routes.count("init_weight_transfer_engine") == 1
    transport.detach(server.url)
    receivers.portal.run(transport.attach([server]))
    assert fake.routes.count("init_weight_transfer_engine") == 2
    transport.close()


def test_gpu_transports_need_gpus():
    for transfer in ("cuda_ipc", "nccl"):
        config = VLLMRolloutConfig(transfer=transfer)
        with pytest.raises(UserError, match="shared_memory"):
            open_transport(config, dtype=torch.float32, device=torch.device("cpu"), rank=0, world_size=1)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = VLLMRolloutConfig(transfer="disk", transfer_folder=tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"rollout\.transfer_folder"):
        open_transport(config, dtype=torch.float32, device=torch.device("cpu"), rank=0, world_size=1)


LEAVES_A_FILE = """
import sys, time
from pathlib import Path
import torch
from megatron_klear.rollout.weights.files import BucketFolder
folder = BucketFolder(Path(sys.argv[1]), durable=True)
for publish in (True, False):
    bucket = folder.new_bucket()
    bucket.add("weight", torch.ones(1000))
    if publish:
        bucket.publish()
print(folder.path, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def leave_a_file(folder: Path, what: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", LEAVES_A_FILE, str(folder), what],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    )


def test_files_of_a_killed_run_are_removed_by_the_next_and_those_of_a_living_one_are_not(tmp_path):
    with leave_a_file(tmp_path, "wait") as run:
        left = Path(run.stdout.readline().strip())
        assert left.stat().st_mode & 0o777 == 0o700
        assert len(files_below(left)) == 2
        BucketFolder(tmp_path, durable=False).close()
        assert len(files_below(left)) == 2
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert left.exists()
    BucketFolder(tmp_path, durable=False).close()
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_run_removes_its_folder(tmp_path):
    with leave_a_file(tmp_path, "end") as run:
        run.wait(60)
    assert list(tmp_path.iterdir()) == []
