"""Processes started by torchrun: found through the environment alone, one process when there is none.

with process_group(settings.gpu) as processes: ...
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from dataloader import Shard
from utils import UserError

# After which a process gives up waiting for the others; the longest of them may evaluate or compile meanwhile.
TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; ``gpu_ids`` are the GPUs it drives (several: DataParallel), none on a CPU."""

    rank: int
    world_size: int
    device: torch.device
    gpu_ids: tuple[int, ...]

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and lines."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of every batch."""
        return Shard(self.rank, self.world_size)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def interleave(self, own: Tensor, total: int) -> Tensor | None:
        """What ``Batches`` dealt out for evaluation, put together by the main process; None in the others.

        Args:
            own: of ``total`` entries, process r holds r, r + world_size, ...; on the CPU.
        """
        if self.world_size == 1:
            return own
        most = -(-total // self.world_size)
        # All parts must have one size.
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(padded, parts)
        if parts is None:
            return None
        whole = own.new_empty(total, *own.shape[1:])
        for rank, part in enumerate(parts):
            entries = whole[rank :: self.world_size]
            entries.copy_(part[: len(entries)])
        return whole

    def largest(self, value: int) -> int:
        """The largest of a number over all processes; they wait for each other, but not for their GPUs."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def share_buffers(self, network: nn.Module) -> None:
        """Give all processes the main one's BatchNorm statistics, which are those that are saved."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether ``error`` says that another process of the run is gone."""
    network_errors = (getattr(dist, "DistNetworkError", ()), getattr(dist, "DistBackendError", ()))
    return isinstance(error, network_errors) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
    )


@contextmanager
def process_group(gpu: tuple[int, ...] | None) -> Iterator[Processes]:
    """Join the processes torchrun started, or be alone.

    Args:
        gpu: --gpu; under torchrun every process takes the GPU of its local rank.

    Raises:
        UserError: a GPU that does not exist, --gpu under torchrun, more processes than GPUs, or restarts that cannot work.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    available = torch.cuda.device_count()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if gpu is not None and (max(gpu) >= available or len(set(gpu)) < len(gpu)):
        one_each = "name each once" if len(set(gpu)) < len(gpu) else "counted from 0"
        raise UserError(
            f"--gpu {','.join(map(str, gpu))}: this machine has {available} GPU{'s' * (available != 1)}, {one_each}"
        )
    if gpu is not None and world_size > 1:
        raise UserError(
            "--gpu and torchrun do not go together: every process takes the GPU of its local rank"
        )
    if world_size > 1 and 0 < available < local_world_size:
        raise UserError(
            f"torchrun started {local_world_size} processes here for {available} GPUs; use --nproc_per_node {available}"
        )
    is_restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and local_world_size < world_size
    if is_restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A second start would find the addresses of the first one's processes there.
        raise UserError(
            "--max-restarts over several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"
        )
    if world_size > 1:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        gpu_ids = (local_rank,) if local_rank < available else ()
    else:
        gpu_ids = gpu or ((0,) if available else ())
    device = torch.device("cuda", gpu_ids[0]) if gpu_ids else torch.device("cpu")
    if gpu_ids:
        torch.cuda.set_device(device)
    if world_size > 1:
        store, _, _ = next(rendezvous("env://", rank, world_size))
        if local_world_size == world_size:
            # torchrun keeps its store when it starts the processes again, with the addresses of those that are gone.
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # What lies in main memory, as signals and results do, is exchanged without the GPUs.
        backend = "cpu:gloo,cuda:nccl" if gpu_ids else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    yield Processes(rank, world_size, device, gpu_ids)
    # Only when all went well: the others would wait for a process that failed, and it for them.
    if world_size > 1:
        dist.destroy_process_group()
