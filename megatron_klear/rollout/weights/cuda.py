"""Weights from GPU to GPU: by handles to the trainer's memory on a shared card, or broadcast by NCCL to others.

Both speak to vLLM's own engines on the servers' side, without vLLM here. Neither has been run against a server: there
was no machine with a card and vLLM. Their order of calls and what they post is tested.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_klear.distributed import exchange
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.vllm.client import Portal, ServerClient, ServerError
from megatron_klear.rollout.weights.base import BACKENDS, check_server
from megatron_klear.rollout.weights.nccl import Communicator, NCCLError, new_unique_id
from megatron_klear.rollout.weights.update import WeightUpdate

Result = TypeVar("Result")
Handles = dict[str, tuple[Any, ...]]
"""How to open one tensor, by the UUID of the card that holds it."""
_POLL_SECONDS = 0.001
_reduce: Callable[[Tensor], tuple[Any, tuple[Any, ...]]] = reduce_tensor


def buckets(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in `dtype`, contiguous, in lists of at most `bucket_bytes` or of one larger tensor."""
    bucket: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in weights:
        ready = tensor.detach().to(dtype).contiguous()
        if bucket and used + ready.nbytes > bucket_bytes:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, ready))
        used += ready.nbytes
    if bucket:
        yield bucket


def metadata(bucket: Sequence[tuple[str, Tensor]]) -> dict[str, list[Any]]:
    """Names, dtypes and shapes as vLLM's update info has them."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


class CudaIPCTransport:
    """Servers on the trainer's cards open the trainer's own memory; each worker that of its card.

    Every rank of the world makes handles for its card. Memory that a handle names must not come from PyTorch's
    expandable segments (PYTORCH_CUDA_ALLOC_CONF).
    """

    needs_shared_device = True

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        world_size: int,
        bucket_bytes: int,
        timeout_seconds: float,
    ) -> None:
        """`rank` and `world_size` are of torch.distributed's default group."""
        self._dtype, self._device, self._rank, self._world_size = dtype, device, rank, world_size
        self._bucket_bytes, self._timeout_seconds = bucket_bytes, timeout_seconds
        self._card = str(torch.cuda.get_device_properties(device).uuid)
        self._attached: set[str] = set()

    async def attach(self, servers: Sequence[ServerClient]) -> None:
        """Check the servers that are new."""

        async def attach_one(server: ServerClient) -> None:
            await check_server(server, BACKENDS["cuda_ipc"], self._dtype, self._timeout_seconds)
            info = {"init_info": {"packed": False}}
            await server.post("/init_weight_transfer_engine", info, timeout_seconds=self._timeout_seconds)
            self._attached.add(server.url)

        await asyncio.gather(*(attach_one(server) for server in servers if server.url not in self._attached))

    def detach(self, url: str) -> None:
        """Forget a server."""
        self._attached.discard(url)

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        servers: Sequence[ServerClient],
        portal: Portal | None,
    ) -> Checksums:
        """See WeightTransport. A bucket's tensors live until every server has answered."""
        update = None
        if portal is not None:
            update = WeightUpdate(servers, portal, version, timeout_seconds=self._timeout_seconds)
            update.start()
        for bucket in buckets(weights, self._dtype, self._bucket_bytes):
            handles = self._handles([tensor for _, tensor in bucket])
            if update is not None:
                pickled = base64.b64encode(pickle.dumps(handles)).decode()
                update.send(metadata(bucket) | {"ipc_handles_pickled": pickled})
            if self._world_size > 1:
                dist.barrier()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        return {} if update is None else update.finish()

    def close(self) -> None:
        """Let go of memory that servers have closed."""
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def _handles(self, tensors: Sequence[Tensor]) -> list[Handles]:
        """For every tensor the handles of all ranks, on rank 0; after the tensors are written."""
        torch.cuda.current_stream(self._device).synchronize()
        own: list[Handles] = [{self._card: _reduce(tensor)[1]} for tensor in tensors]
        if self._world_size == 1:
            return own
        gathered = exchange.gather_first(own)
        if not gathered:
            return []
        return [
            {card: handle for ranks in place for card, handle in ranks.items()} for place in zip(*gathered, strict=True)
        ]


class NCCLTransport:
    """Rank 0 broadcasts to all workers of all servers, in one NCCL group outside torch.distributed's.

    The group is all or nothing: when a server comes, goes or fails it is void, and the next `send` builds another. All
    processes need the same NCCL_* variables.
    """

    needs_shared_device = False

    def __init__(
        self, *, dtype: torch.dtype, device: torch.device, rank: int, bucket_bytes: int, timeout_seconds: float
    ) -> None:
        """Nothing is connected yet."""
        self._dtype, self._device, self._rank = dtype, device, rank
        self._bucket_bytes, self._timeout_seconds = bucket_bytes, timeout_seconds
        self._workers: dict[str, int] = {}
        self._members: frozenset[str] = frozenset()
        self._group: Communicator | None = None

    async def attach(self, servers: Sequence[ServerClient]) -> None:
        """Check the servers that are new; they join the group at the next `send`."""

        async def attach_one(server: ServerClient) -> None:
            backend = BACKENDS["nccl"]
            self._workers[server.url] = await check_server(server, backend, self._dtype, self._timeout_seconds)

        await asyncio.gather(*(attach_one(server) for server in servers if server.url not in self._workers))

    def detach(self, url: str) -> None:
        """Forget a server, and give the group up if it was in it."""
        self._workers.pop(url, None)
        if url in self._members:
            self._void()

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        servers: Sequence[ServerClient],
        portal: Portal | None,
    ) -> Checksums:
        """See WeightTransport. Servers receive a bucket while it is broadcast."""
        if portal is None:
            for _ in weights:
                pass
            return {}
        update = WeightUpdate(servers, portal, version, timeout_seconds=self._timeout_seconds)
        self._assemble(update, portal)
        update.start()
        for bucket in buckets(weights, self._dtype, self._bucket_bytes):
            self._lose_all_or_none(update)
            if update.alive:
                self._broadcast(update, portal, bucket)
        self._lose_all_or_none(update)
        return update.finish()

    def close(self) -> None:
        """End the group."""
        if self._group is not None:
            self._group.close()
        self._group, self._members = None, frozenset()

    def _assemble(self, update: WeightUpdate, portal: Portal) -> None:
        """Have a group of exactly the servers of this update, or give the update up."""
        wanted = frozenset(update.alive)
        if self._group is not None and self._members == wanted:
            return
        self._void()
        update.each("leaving the old NCCL group", self._leave)
        if update.failures:  # the group was to have all of them
            update.drop_all("joining the NCCL group: another server of it failed")
        if not update.alive:
            return
        try:
            self._group = portal.run(self._join(list(update.alive.values())), self._timeout_seconds)
            self._members = wanted
        except (ServerError, NCCLError) as error:
            update.drop_all(f"joining the NCCL group: {error}")
        except TimeoutError:
            update.drop_all(
                f"joining the NCCL group: not all came within {self._timeout_seconds:g} s; the hosts must reach each "
                "other (NCCL_SOCKET_IFNAME) and have the same NCCL_* variables"
            )

    async def _join(self, servers: Sequence[ServerClient]) -> Communicator:
        """All workers take their places after this process, server by server."""
        unique, world_size, offset = new_unique_id(), 1 + sum(self._workers[server.url] for server in servers), 1
        posts = []
        for server in servers:
            info = {
                "nccl_unique_id_b64": base64.b64encode(unique).decode(),
                "rank_offset": offset,
                "world_size": world_size,
                "packed": False,
            }
            posts.append(self._post(server, "/init_weight_transfer_engine", {"init_info": info}))
            offset += self._workers[server.url]
        # Joining waits for all members, so it is done beside the requests; it cannot be interrupted, hence a daemon.
        joined = _in_daemon(lambda: Communicator(unique, world_size, self._device))
        try:
            await asyncio.gather(*posts)
            return await asyncio.wrap_future(joined)
        except BaseException:
            joined.add_done_callback(_abort_latecomer)
            raise

    def _broadcast(self, update: WeightUpdate, portal: Portal, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Send one bucket and wait until it has arrived, a server fails, or it takes too long."""
        assert self._group is not None
        info = metadata(bucket)
        loads = {server.url: portal.start(update.load(server, info)) for server in update.alive.values()}
        try:
            for _, tensor in bucket:
                self._group.broadcast(tensor)
            sent: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record(torch.cuda.current_stream(self._device))
            deadline = time.monotonic() + self._timeout_seconds
            while not (sent.query() and all(load.done() for load in loads.values())):
                if any(load.done() and load.exception() for load in loads.values()) or time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
        except NCCLError as error:
            update.drop_all(f"update_weights: {error}")
        unfinished = TimeoutError(f"a broadcast did not end within {self._timeout_seconds:g} s")
        update.settle(
            "update_weights", {url: load.exception() if load.done() else unfinished for url, load in loads.items()}
        )
        for load in loads.values():
            load.cancel()

    def _lose_all_or_none(self, update: WeightUpdate) -> None:
        """One server out of the group leaves the others waiting for it in NCCL: end the group and the update."""
        if update.failures:
            update.drop_all("update_weights: another server of its NCCL group failed")
            self._void()

    def _void(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group, self._members = None, frozenset()

    async def _leave(self, server: ServerClient) -> None:
        """Have a server leave the group that it may be in, and give up an update that it may be in the middle of."""
        await server.rpc("klear_begin_update", ["none"], timeout_seconds=self._timeout_seconds)
        await self._post(server, "/shutdown_weight_transfer_engine", None)

    async def _post(self, server: ServerClient, path: str, body: dict[str, Any] | None) -> None:
        await server.post(path, body, timeout_seconds=self._timeout_seconds)


def _in_daemon(function: Callable[[], Result]) -> Future[Result]:
    """Run in a thread that does not keep the process alive."""
    future: Future[Result] = Future()

    future.set_running_or_notify_cancel()  # from here on nobody can cancel it

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _abort_latecomer(joined: Future[Communicator]) -> None:
    """End a group that came about after it was given up."""
    if joined.exception() is None:
        joined.result().abort()
