"""GPU transports without a GPU: buckets, what is posted, the order of NCCL's handshake, and failures; then with one."""

import base64
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from aiohttp import web
from fake_receiver import FakeReceiver, Receivers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klear.rollout.weights import cuda as transfer_cuda
from megatron_klear.rollout.weights.checksum import checksum
from megatron_klear.rollout.weights.cuda import CudaIPCTransport, NCCLTransport, buckets, metadata
from megatron_klear.rollout.weights.update import TransferFailed

WEIGHTS = {f"layer.{index}.weight": torch.full((100, 5), float(index)) for index in range(5)}
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def receivers():
    receivers = Receivers()
    yield receivers
    receivers.close()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 300))
def test_buckets_hold_all_in_order_and_keep_their_size(sizes, limit):
    weights = [(f"w{index}", torch.randn(size, 2).t()) for index, size in enumerate(sizes)]
    made = list(buckets(weights, torch.bfloat16, limit))
    assert [name for bucket in made for name, _ in bucket] == [name for name, _ in weights]
    for bucket in made:
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= limit
        assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for _, tensor in bucket)
    for (_, tensor), (_, sent) in zip(weights, (pair for bucket in made for pair in bucket), strict=True):
        assert torch.equal(tensor.bfloat16(), sent)


class NoStream:
    """A stream that has done everything."""

    def synchronize(self):
        pass


class Done:
    """An event that has happened."""

    def record(self, stream):
        pass

    def query(self):
        return True


@pytest.fixture
def no_cuda(monkeypatch):
    """torch.cuda's calls of the transports, as on a machine with an idle card."""

    class Card:
        uuid = "card-0"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: NoStream())
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Done)


def test_ipc_posts_what_opens_every_tensor_and_keeps_them_until_the_answer(receivers, no_cuda, monkeypatch):
    alive: dict[int, torch.Tensor] = {}

    def reduce(tensor):
        alive[id(tensor)] = tensor
        return None, ("rebuild", id(tensor))

    monkeypatch.setattr(transfer_cuda, "_reduce", reduce)
    fake = FakeReceiver(backend="klear_ipc", dtype="bfloat16")

    def opened(info):
        handles = pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))
        assert [list(handle) for handle in handles] == [["card-0"]] * len(info["names"])
        tensors = [alive[handle["card-0"][1]] for handle in handles]
        assert info["dtype_names"] == ["bfloat16"] * len(tensors)
        assert info["shapes"] == [list(tensor.shape) for tensor in tensors]
        return dict(zip(info["names"], tensors, strict=True))

    fake.on_update = opened
    server = receivers.add(fake)
    transport = CudaIPCTransport(
        dtype=torch.bfloat16, device=DEVICE, rank=0, world_size=1, bucket_bytes=2500, timeout_seconds=10
    )
    receivers.portal.run(transport.attach([server]))
    assert dict(fake.calls)["init_weight_transfer_engine"] == {"init_info": {"packed": False}}
    held = transport.send(WEIGHTS.items(), 1, [server], receivers.portal)
    assert held == {f"{server.url} worker 0": {n: checksum(t.bfloat16()) for n, t in WEIGHTS.items()}}
    assert fake.routes.count("update_weights") == 3
    transport.close()


def gathered_handles() -> list[dict[str, tuple]]:
    """What a rank has after all gave their handles."""
    import torch.distributed as dist

    rank = dist.get_rank()

    class Card:
        uuid = f"card-{rank}"

    torch.cuda.get_device_properties = lambda device: Card
    torch.cuda.current_stream = lambda device=None: NoStream()
    transfer_cuda._reduce = lambda tensor: (None, (rank, float(tensor)))
    transport = CudaIPCTransport(
        dtype=torch.float32, device=DEVICE, rank=rank, world_size=2, bucket_bytes=1, timeout_seconds=1
    )
    return transport._handles([torch.tensor(1.0), torch.tensor(2.0)])


def test_ipc_handles_of_all_ranks_come_together_on_the_first(ranks):
    first, second = ranks(2, gathered_handles)
    assert first == [{"card-0": (0, value), "card-1": (1, value)} for value in (1.0, 2.0)]
    assert second == []


class FakeGroup:
    """Stands for NCCL: members arrive through their servers' answers, broadcasts are kept."""

    arrived: threading.Semaphore
    sent: list[torch.Tensor]
    world_size = 0
    ended: list[str]

    def __init__(self, unique_id, world_size, device):
        assert unique_id == b"u" * 128
        assert device == DEVICE
        FakeGroup.world_size = world_size
        for _ in range(world_size - 1):
            assert self.arrived.acquire(timeout=3)

    def broadcast(self, tensor):
        self.sent.append(tensor)

    def abort(self):
        self.ended.append("abort")

    def close(self):
        self.ended.append("close")


@pytest.fixture
def group(no_cuda, monkeypatch):
    FakeGroup.arrived, FakeGroup.sent, FakeGroup.ended = threading.Semaphore(0), [], []
    monkeypatch.setattr(transfer_cuda, "Communicator", FakeGroup)
    monkeypatch.setattr(transfer_cuda, "new_unique_id", lambda: b"u" * 128)
    return FakeGroup


def nccl_server(workers: int) -> FakeReceiver:
    """A server whose workers join the fake group and receive what is broadcast."""
    fake = FakeReceiver(backend="klear_nccl", workers=workers)

    def join(name, fake):
        if name == "init_weight_transfer_engine":
            for _ in range(workers):
                FakeGroup.arrived.release()

    def received(info):
        count, deadline = len(fake.loaded) + len(info["names"]), time.monotonic() + 5
        while len(FakeGroup.sent) < count and time.monotonic() < deadline:
            time.sleep(0.001)  # the broadcast runs beside this request
        return dict(zip(info["names"], FakeGroup.sent[len(fake.loaded) : count], strict=True))

    fake.fault, fake.on_update = join, received
    return fake


def open_nccl(timeout_seconds: float = 10) -> NCCLTransport:
    return NCCLTransport(dtype=torch.float32, device=DEVICE, rank=0, bucket_bytes=4000, timeout_seconds=timeout_seconds)


def test_nccl_gives_every_worker_a_place_and_broadcasts_beside_the_requests(receivers, group):
    fakes = [nccl_server(2), nccl_server(1)]
    servers = [receivers.add(fake) for fake in fakes]
    transport = open_nccl()
    receivers.portal.run(transport.attach(servers))
    held = transport.send(WEIGHTS.items(), 1, servers, receivers.portal)
    assert group.world_size == 4
    places = [dict(fake.calls)["init_weight_transfer_engine"]["init_info"] for fake in fakes]
    assert [place["rank_offset"] for place in places] == [1, 3]
    assert all(
        place["world_size"] == 4 and base64.b64decode(place["nccl_unique_id_b64"]) == b"u" * 128 for place in places
    )
    assert all("master_address" not in place for place in places)
    assert [dict(fake.calls)["update_weights"]["update_info"] for fake in fakes] == [
        metadata([("layer.4.weight", WEIGHTS["layer.4.weight"])])
    ] * 2
    expected = {name: checksum(tensor) for name, tensor in WEIGHTS.items()}
    assert list(held.values()) == [expected] * 3
    assert [torch.equal(a, b) for a, b in zip(group.sent, WEIGHTS.values(), strict=True)] == [True] * 5
    order = fakes[0].routes
    assert order.index("shutdown_weight_transfer_engine") < order.index("init_weight_transfer_engine")
    assert order.index("init_weight_transfer_engine") < order.index("start_weight_update")
    transport.close()
    assert group.ended == ["close"]


def test_nccl_keeps_its_group_and_builds_another_when_a_server_was_restarted(receivers, group):
    fake = nccl_server(1)
    server = receivers.add(fake)
    transport = open_nccl()

    def send(version):
        receivers.portal.run(transport.attach([server]))
        fake.loaded.clear()
        group.sent.clear()
        transport.send(WEIGHTS.items(), version, [server], receivers.portal)

    send(1)
    send(2)
    assert fake.routes.count("init_weight_transfer_engine") == 1
    transport.detach(server.url)
    send(3)
    assert fake.routes.count("init_weight_transfer_engine") == 2
    assert group.ended == ["abort"]


def test_a_server_that_fails_ends_the_update_of_all_in_its_group(receivers, group):
    fakes = [nccl_server(1), nccl_server(1)]
    servers = [receivers.add(fake) for fake in fakes]
    transport = open_nccl()
    receivers.portal.run(transport.attach(servers))
    join = fakes[1].fault

    def fault(name, fake):
        join(name, fake)
        if name == "update_weights" and fake.routes.count(name) == 2:
            raise web.HTTPInternalServerError(text="worker died")

    fakes[1].fault = fault
    left = iter(WEIGHTS.items())
    with pytest.raises(TransferFailed, match="worker died") as raised:
        transport.send(left, 1, servers, receivers.portal)
    assert set(raised.value.failures) == {server.url for server in servers}
    assert raised.value.checksums == {}
    assert next(left, None) is None
    assert group.ended == ["abort"]


def test_a_group_that_not_all_join_is_given_up_in_time(receivers, group):
    fake = nccl_server(1)
    server = receivers.add(fake)
    transport = open_nccl(timeout_seconds=0.5)
    receivers.portal.run(transport.attach([server]))
    fake.fault = None
    with pytest.raises(TransferFailed, match="NCCL_SOCKET_IFNAME"):
        transport.send(WEIGHTS.items(), 1, [server], receivers.portal)
    group.arrived.release()
    deadline = time.monotonic() + 5
    while not group.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert group.ended == ["abort"]  # of the group that came about too late


OPENS_HANDLES = """
import base64, pickle, sys
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from megatron_klear.rollout.weights.checksum import checksum
torch.cuda.init()
handles = pickle.loads(base64.b64decode(sys.stdin.readline()))
for handle in handles:
    (arguments,) = handle.values()
    arguments = list(arguments)
    arguments[6] = 0
    print(checksum(rebuild_cuda_tensor(*arguments)), flush=True)
"""


@pytest.mark.gpu
def test_another_process_opens_the_handles_and_sees_the_same_bits():
    transport = CudaIPCTransport(
        dtype=torch.bfloat16, device=DEVICE, rank=0, world_size=1, bucket_bytes=1 << 20, timeout_seconds=60
    )
    storage = torch.randn(5000, device=DEVICE, dtype=torch.bfloat16)
    tensors = [storage[100:1100].view(10, 100), torch.randn(300, 7, device=DEVICE).bfloat16()]
    handles = transport._handles(tensors)
    (card,) = {card for handle in handles for card in handle}
    assert card == str(torch.cuda.get_device_properties(DEVICE).uuid)
    pickled = base64.b64encode(pickle.dumps(handles)).decode()
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", OPENS_HANDLES], input=pickled, capture_output=True, text=True, cwd=root, timeout=300
    )
    assert answer.stdout.split() == [checksum(tensor) for tensor in tensors], answer.stderr
    transport.close()
