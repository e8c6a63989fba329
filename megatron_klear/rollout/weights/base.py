"""How weights get from the trainer to rollout servers: one interface, four ways.

`shared_memory` and `disk` write each bucket to a file that the servers read; `cuda_ipc` and `nccl` are in
`transfer_cuda`. The server's side of all of them is `vllm_extension`.
"""

from __future__ import annotations

import asyncio
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megatron_klear.errors import UserError
from megatron_klear.rollout.engine import Checksums
from megatron_klear.rollout.vllm.client import Portal, ServerClient, ServerError
from megatron_klear.rollout.weights.files import Bucket, BucketFolder
from megatron_klear.rollout.weights.update import TransferFailed, WeightUpdate

if TYPE_CHECKING:
    from megatron_klear.config.rollout import VLLMRolloutConfig
    from megatron_klear.models.peft import AdapterForm

__all__ = ["BACKENDS", "WORKER_EXTENSION", "TransferFailed", "WeightTransport", "open_transport"]

WORKER_EXTENSION = "megatron_klear.rollout.weights.receiver.WeightReceiver"
"""What servers need as --worker-extension-cls, with this package on their PYTHONPATH."""
BACKENDS = {"shared_memory": "klear_file", "disk": "klear_file", "cuda_ipc": "klear_ipc", "nccl": "klear_nccl"}
"""Backend in the servers' --weight-transfer-config for each value of `rollout.transfer`."""

_LONGEST_REQUEST_SECONDS = 600.0
# A file on a network disk may become visible to another host late.
_DISK_WAIT_SECONDS = 60.0


class WeightTransport(Protocol):
    """Moves weights into the servers, bucket by bucket, and tells what arrived."""

    needs_shared_device: bool
    """Whether servers must run on the trainer's own cards."""

    async def attach(self, servers: Sequence[ServerClient]) -> None:
        """Make the servers ready to receive; those that are already are left alone.

        Raises UserError where a server was not started for this transport, ServerError where it does not answer.
        """
        ...

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        servers: Sequence[ServerClient],
        portal: Portal | None,
    ) -> Checksums:
        """Load `weights`, under their Hugging Face names, into the servers; to be called while they are paused.

        Collective: every rank goes once through `weights`, which gathers them. Only rank 0 has servers and a portal
        and gets checksums, by "<address> worker <n>" and name of tensor. At most `rollout.bucket_bytes` and one tensor
        are held at a time. Raises TransferFailed on rank 0 when a server did not get everything; `weights` is at its
        end then as well, so that no other rank is left waiting.
        """
        ...

    def detach(self, url: str) -> None:
        """Forget a server that went away."""
        ...

    def close(self) -> None:
        """Give back files and connections."""
        ...


def open_transport(
    config: VLLMRolloutConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    world_size: int,
    adapter: AdapterForm | None = None,
) -> WeightTransport:
    """The transport that `rollout.transfer` names; with `adapter`, what is sent are adapters of this form, as files.

    `dtype` is what the servers hold and what is sent; `device` is this rank's. Raises UserError where the transport
    cannot work here.
    """
    timeout = min(_LONGEST_REQUEST_SECONDS, config.request_seconds)
    if config.transfer in ("shared_memory", "disk"):
        on_disk = config.transfer == "disk"
        root = config.transfer_folder or Path("/dev/shm")
        folder, bucket_bytes = None, config.bucket_bytes
        if rank == 0:
            try:
                folder = BucketFolder(root, durable=on_disk)
                # Containers often have a small /dev/shm.
                bucket_bytes = min(bucket_bytes, max(1, shutil.disk_usage(root).free // 2))
            except OSError as error:
                raise UserError(
                    f"rollout.transfer = {config.transfer} cannot write to {root}: {error}; "
                    "name another folder in rollout.transfer_folder"
                ) from None
        wait = _DISK_WAIT_SECONDS if on_disk else 0.0
        if adapter is not None:
            from megatron_klear.rollout.weights.adapter import AdapterTransport

            return AdapterTransport(folder, adapter, dtype=dtype, timeout_seconds=timeout, wait_seconds=wait)
        return FileTransport(folder, dtype=dtype, bucket_bytes=bucket_bytes, timeout_seconds=timeout, wait_seconds=wait)
    if device.type != "cuda":
        raise UserError(
            f"rollout.transfer = {config.transfer} moves weights between GPUs and the trainer runs on {device.type}; "
            "use shared_memory, or disk where servers run on another host"
        )
    from megatron_klear.rollout.weights.cuda import CudaIPCTransport, NCCLTransport

    if config.transfer == "cuda_ipc":
        return CudaIPCTransport(
            dtype=dtype,
            device=device,
            rank=rank,
            world_size=world_size,
            bucket_bytes=config.bucket_bytes,
            timeout_seconds=timeout,
        )
    return NCCLTransport(
        dtype=dtype, device=device, rank=rank, bucket_bytes=config.bucket_bytes, timeout_seconds=timeout
    )


async def check_server(
    server: ServerClient,
    backend: str,
    dtype: torch.dtype,
    timeout_seconds: float,
    *,
    adapter: AdapterForm | None = None,
) -> int:
    """Number of workers of a server that is fit to receive: whole weights, or adapters of a form.

    Raises UserError naming what it was started with.
    """
    try:
        workers = await server.rpc("klear_describe", timeout_seconds=timeout_seconds)
    except ServerError as error:
        if error.status is None:
            raise
        raise UserError(
            f"{server.url} cannot receive weights: {error}. Start it with python tools/serve_rollouts.py, or give it "
            f"VLLM_SERVER_DEV_MODE=1, --worker-extension-cls {WORKER_EXTENSION} and --weight-transfer-config "
            f'\'{{"backend": "{backend}"}}\''
        ) from None
    wanted = {"backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    for worker in workers:
        for key, value in wanted.items():
            if worker[key] != value:
                raise UserError(
                    f"{server.url} was started with {key} {worker[key]} and the run's [rollout] asks for {value}; "
                    "start both from the same settings"
                )
        if adapter is not None:
            _check_adapters(server.url, worker, adapter)
    return len(workers)


def _check_adapters(url: str, worker: Mapping[str, str], form: AdapterForm) -> None:
    """Raise UserError where a worker would leave out part of an adapter, or put it on another base."""
    if int(worker.get("lora_rank", 0)) < form.rank:
        raise UserError(
            f"{url} takes adapters up to rank {worker.get('lora_rank', 0)}, and lora.sync = adapter sends "
            f"some of rank {form.rank}: start it with tools/serve_rollouts.py, or with --enable-lora and a larger "
            "--max-lora-rank"
        )
    targets = worker.get("lora_targets", "").split()
    if targets and (left_out := sorted(set(form.targets) - set(targets))):
        raise UserError(
            f"{url} puts adapters on {', '.join(targets)} alone, and lora.sync = adapter sends {', '.join(left_out)} "
            "as well: start it with tools/serve_rollouts.py, or name them in its --lora-target-modules"
        )
    if worker.get("base") == "replaced":
        raise UserError(
            f"{url} was sent whole weights since it was started, and lora.sync = adapter needs the base that it was "
            "started with: start it again"
        )


class ByFiles(ABC):
    """By files that the servers read: in /dev/shm for those on this host, on a shared disk for any."""

    needs_shared_device = False

    def __init__(
        self, folder: BucketFolder | None, *, dtype: torch.dtype, timeout_seconds: float, wait_seconds: float = 0.0
    ) -> None:
        """`folder` is None on ranks that only take part in gathering."""
        self._folder, self._dtype = folder, dtype
        self._timeout_seconds, self._wait_seconds = timeout_seconds, wait_seconds
        self._attached: set[str] = set()

    async def attach(self, servers: Sequence[ServerClient]) -> None:
        """Check the servers that are new."""

        async def attach_one(server: ServerClient) -> None:
            await self._check(server)
            self._attached.add(server.url)

        await asyncio.gather(*(attach_one(server) for server in servers if server.url not in self._attached))

    def detach(self, url: str) -> None:
        """Forget a server."""
        self._attached.discard(url)

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            self._folder.close()

    @abstractmethod
    async def _check(self, server: ServerClient) -> None:
        """Raise UserError where a server that is new cannot receive."""


class FileTransport(ByFiles):
    """Weights as buckets, a file each."""

    def __init__(
        self,
        folder: BucketFolder | None,
        *,
        dtype: torch.dtype,
        bucket_bytes: int,
        timeout_seconds: float,
        wait_seconds: float = 0.0,
    ) -> None:
        """Files of about `bucket_bytes`, for servers that start to read within `wait_seconds` of hearing of them."""
        super().__init__(folder, dtype=dtype, timeout_seconds=timeout_seconds, wait_seconds=wait_seconds)
        self._bucket_bytes = bucket_bytes

    async def _check(self, server: ServerClient) -> None:
        await check_server(server, BACKENDS["disk"], self._dtype, self._timeout_seconds)
        await server.post("/init_weight_transfer_engine", {"init_info": {}}, timeout_seconds=self._timeout_seconds)

    def send(
        self,
        weights: Iterable[tuple[str, Tensor]],
        version: int,
        servers: Sequence[ServerClient],
        portal: Portal | None,
    ) -> Checksums:
        """See WeightTransport. A bucket's file is gone as soon as all servers have read it."""
        if portal is None or self._folder is None:
            for _ in weights:
                pass
            return {}
        update = WeightUpdate(servers, portal, version, timeout_seconds=self._timeout_seconds)
        update.start()
        bucket = None
        try:
            for name, tensor in weights:
                if update.alive:  # or else only take part in gathering
                    bucket = self._add(update, bucket, name, tensor.detach().to(self._dtype))
            if bucket is not None and update.alive:
                self._deliver(update, bucket)
        finally:
            if bucket is not None:
                bucket.remove()
        return update.finish()

    def _add(self, update: WeightUpdate, bucket: Bucket | None, name: str, tensor: Tensor) -> Bucket | None:
        assert self._folder is not None
        try:
            if bucket is not None and not bucket.has_room(name, tensor, self._bucket_bytes):
                self._deliver(update, bucket)
                bucket = None
            if bucket is None:
                bucket = self._folder.new_bucket()
            bucket.add(name, tensor)
        except OSError as error:
            if bucket is not None:
                bucket.remove()
            self._give_up(update, error)
            return None
        return bucket

    def _deliver(self, update: WeightUpdate, bucket: Bucket) -> None:
        try:
            info: dict[str, Any] = {"path": str(bucket.publish()), "wait_seconds": self._wait_seconds}
            update.send(info)
        except OSError as error:
            self._give_up(update, error)
        finally:
            bucket.remove()

    def _give_up(self, update: WeightUpdate, error: OSError) -> None:
        assert self._folder is not None
        update.drop_all(
            f"a bucket of up to {self._bucket_bytes} bytes could not be written to {self._folder.path.parent}: "
            f"{error}; lower rollout.bucket_bytes or give that folder more room"
        )
