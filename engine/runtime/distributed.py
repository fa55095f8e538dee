"""Processes started by torchrun, found through the environment alone; one process when there is none.

Example:
    with process_group(settings.gpu) as processes: ...
"""

import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from image_data.subsets import Shard
from models.errors import first_line
from utils import UserError

# After this time a process gives up waiting for the others, which may evaluate or compile meanwhile.
TIMEOUT = timedelta(minutes=15)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process, one of those that train together.

    ``gpu_ids`` are the GPUs it uses (several: DataParallel), none on a CPU.
    """

    rank: int
    world_size: int
    device: torch.device
    gpu_ids: tuple[int, ...]

    @property
    def is_main(self) -> bool:
        """True if this process writes files and lines."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of every batch."""
        return Shard(self.rank, self.world_size)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, own: Tensor, indices: Tensor) -> Tensor | None:
        """Put rows of all processes together in the main process; return None in the others.

        Args:
            own: Rows of this process, on the CPU.
            indices: Indices of these rows, int64 from 0, by which all rows are sorted; each occurs in one
                process.
        """
        if self.world_size == 1:
            return own
        # Gathered tensors must have one size. Indices are padded with -1.
        count = self.all_reduce_max(len(own))
        parts = self._gather_equal(_padded(own, count, 0))
        part_indices = self._gather_equal(_padded(indices, count, -1))
        if not self.is_main:
            return None
        all_indices = torch.cat(part_indices)
        sorted_indices = all_indices[all_indices >= 0].sort().values
        whole = own.new_empty(len(sorted_indices), *own.shape[1:])
        # One process at a time: a concatenation of all rows would double the memory.
        for rows, numbers in zip(parts, part_indices, strict=True):
            is_row = numbers >= 0
            whole[torch.searchsorted(sorted_indices, numbers[is_row])] = rows[is_row]
        return whole

    def _gather_equal(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape, in the main process; else no tensor."""
        parts = [torch.empty_like(own) for _ in range(self.world_size)] if self.is_main else []
        dist.gather(own, parts or None)
        return parts

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a number over all processes, which wait for each other, not for GPUs."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def all_equal(self, value: int) -> bool:
        """Return True if all processes have the same number."""
        return self.all_reduce_max(value) == -self.all_reduce_max(-value)

    def share_buffers(self, network: nn.Module) -> None:
        """Give all processes the main process's buffers, such as BatchNorm statistics, which it saves."""
        if self.world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


def _padded(rows: Tensor, count: int, value: int) -> Tensor:
    """Return ``count`` rows: these, and then rows of ``value``."""
    return torch.cat([rows, rows.new_full((count - len(rows), *rows.shape[1:]), value)])


class TorchrunEnvironment(NamedTuple):
    """What torchrun says about this process; the defaults are those of a process without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart_count: int = 0  # how often torchrun has started the processes again


def torchrun_environment() -> TorchrunEnvironment:
    """Read RANK, WORLD_SIZE and the other variables of torchrun; empty ones count as not set.

    Raises:
        UserError: A value is not a number, or RANK is not below WORLD_SIZE, as some schedulers leave it.
    """
    world_size = _variable("WORLD_SIZE", 1, smallest=1)
    rank = _variable("RANK", 0)
    local_world_size = _variable("LOCAL_WORLD_SIZE", world_size, smallest=1)
    if rank >= world_size:
        given = f"WORLD_SIZE={world_size}" if os.environ.get("WORLD_SIZE") else "no WORLD_SIZE"
        raise UserError(
            f"the environment has RANK={rank} and {given}: torchrun sets both; unset RANK for one process"
        )
    restart_count = _variable("TORCHELASTIC_RESTART_COUNT", 0)
    return TorchrunEnvironment(rank, world_size, _variable("LOCAL_RANK", 0), local_world_size, restart_count)


def launch_id() -> str | None:
    """Return what tells a launch of torchrun from others, and stays the same when it restarts its processes.

    Returns:
        None without torchrun, and for a launch over several machines without --rdzv_id.
    """
    torchrun_id, environment = os.environ.get("TORCHELASTIC_RUN_ID"), torchrun_environment()
    if torchrun_id is None:
        return None
    if environment.local_world_size == environment.world_size:
        # The id may be used again, and is "none" without --rdzv_id; the agent is one process.
        return f"{torchrun_id} {os.getppid()}"
    return None if torchrun_id == "none" else torchrun_id


def _variable(name: str, default: int, smallest: int = 0) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) < smallest:
        raise UserError(
            f"the environment has {name}={text!r}, which torchrun sets to a number from {smallest}; "
            "unset it for one process"
        )
    return int(text)


def is_lost_peer(error: RuntimeError) -> bool:
    """Return True if ``error`` says that another process of the run is gone."""
    network_errors = (getattr(dist, "DistNetworkError", ()), getattr(dist, "DistBackendError", ()))
    return isinstance(error, network_errors) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
    )


@contextmanager
def process_group(gpu: tuple[int, ...] | None) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone.

    Args:
        gpu: --gpu; under torchrun every process takes the GPU of its local rank.

    Raises:
        UserError: The variables of torchrun are inconsistent, a GPU does not exist, or the other processes
            cannot be reached.
    """
    torchrun, available = torchrun_environment(), torch.cuda.device_count()
    _refuse_gpus(torchrun, gpu, available)
    _refuse_restarts(torchrun)
    if torchrun.world_size > 1:
        gpu_ids = (torchrun.local_rank,) if torchrun.local_rank < available else ()
    else:
        gpu_ids = gpu or ((0,) if available else ())
    device = torch.device("cuda", gpu_ids[0]) if gpu_ids else torch.device("cpu")
    if gpu_ids:
        torch.cuda.set_device(device)
    if torchrun.world_size > 1:
        _join(torchrun, device)
    yield Processes(torchrun.rank, torchrun.world_size, device, gpu_ids)
    # Only when all went well: the others would wait for a process that failed, and it for them.
    if torchrun.world_size > 1:
        leave_process_group()


def _refuse_gpus(torchrun: TorchrunEnvironment, gpu: tuple[int, ...] | None, available: int) -> None:
    if gpu is not None:
        given = f"--gpu {','.join(map(str, gpu))}"
        if len(set(gpu)) < len(gpu):
            raise UserError(f"{given}: name each GPU once")
        if not available:
            raise UserError(f"{given}: PyTorch finds no GPU on this machine; leave --gpu out to use the CPU")
        if max(gpu) >= available:
            there = "GPU 0 alone" if available == 1 else f"GPUs 0 to {available - 1}"
            raise UserError(f"{given}: this machine has {there}")
        if torchrun.world_size > 1:
            raise UserError(
                "--gpu and torchrun do not go together: every process takes the GPU of its local rank"
            )
    if torchrun.world_size > 1 and 0 < available < torchrun.local_world_size:
        raise UserError(
            f"torchrun started {torchrun.local_world_size} processes here for {available} GPUs; "
            f"use --nproc_per_node {available}"
        )


def _refuse_restarts(torchrun: TorchrunEnvironment) -> None:
    is_restarted = _variable("TORCHELASTIC_MAX_RESTARTS", 0) > 0
    has_several_machines = torchrun.local_world_size < torchrun.world_size
    if is_restarted and has_several_machines and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A second start would find the addresses of the first one's processes there.
        raise UserError(
            "--max-restarts over several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in torchrun's environment"
        )


def _join(torchrun: TorchrunEnvironment, device: torch.device) -> None:
    """Meet the other processes at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: An address is missing or cannot be used, or the other processes cannot be reached.
    """
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _variable("MASTER_PORT", 0)
    if not address or not 0 < port < 2**16:
        raise UserError(
            f"the environment has WORLD_SIZE={torchrun.world_size}, but MASTER_ADDR={address!r} and "
            f"MASTER_PORT={port or ''!r}: torchrun sets all of them; unset WORLD_SIZE for one process"
        )
    try:
        in_thread(partial(socket.getaddrinfo, address, port)).result()
        in_thread(partial(_init_process_group, torchrun, device)).result()
    except (RuntimeError, OSError) as error:
        reason = first_line(error)[:200]
        raise UserError(
            f"cannot meet the {torchrun.world_size} processes of this run at {address}:{port} "
            f"(MASTER_ADDR and MASTER_PORT): {reason}"
        ) from None


def _init_process_group(torchrun: TorchrunEnvironment, device: torch.device) -> None:
    store, _, _ = next(rendezvous("env://", torchrun.rank, torchrun.world_size))
    if torchrun.local_world_size == torchrun.world_size:
        # torchrun keeps its store when it restarts the processes, with the addresses of the old ones.
        store = dist.PrefixStore(f"attempt_{torchrun.restart_count}", store)
    # Data in main memory, such as signals and results, are exchanged without the GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    dist.init_process_group(
        backend, store=store, rank=torchrun.rank, world_size=torchrun.world_size, timeout=TIMEOUT
    )


def leave_process_group() -> None:
    """Close the connections with the other processes, after the last exchange, and end Gloo's threads.

    A thread that frees a tensor while Python shuts down would abort the process (pytorch#190489).
    """
    gc.collect()  # DDP, which uses the group, is part of a reference cycle
    # Before PyTorch 2.8 a group holds Python's global lock while it waits for Gloo's threads to end, and they
    # may wait for this lock to free a tensor (pytorch#154976). A backend that outlives its group releases it.
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.destroy_process_group()
    del backend


def in_thread(work: Callable[[], _T]) -> Future[_T]:
    """Start ``work`` in a daemon thread and return the future of its result.

    While the main thread runs C++ code, Python handles no signals; while it waits for a future, it does.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
