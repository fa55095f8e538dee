"""Threads that work ahead, in order, on a bounded number of batches.

Example:
    for images in map_batches(read, [[path_1, path_2], [path_3, path_4]], threads=4): ...

PIL and PyTorch release Python's global lock while they decode and resize, so that threads keep all cores
busy. They need no sockets, no shared memory and no signal handling, as worker processes do.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from utils import UserError

BATCHES_AHEAD = 3


def map_batches(
    function: Callable[[Any], Any],
    batches: Iterable[Sequence],
    threads: int,
    batches_ahead: int = BATCHES_AHEAD,
) -> Iterator[list[Any]]:
    """Yield ``[function(x) for x in batch]`` of every batch, in order.

    Args:
        function: The function, which may run in any thread; its errors are raised here.
        batches: The arguments, in batches.
        threads: Number of threads that work ahead; 0: the calling thread does everything, when asked for it.
        batches_ahead: Batches in work while the caller uses one; 0: the threads rest meanwhile.

    Raises:
        UserError: The system allows fewer threads.
    """
    if threads == 0:
        for batch in batches:
            yield [function(argument) for argument in batch]
        return
    pool, pending = _start(threads), deque()
    try:
        for batch in batches:
            pending.append([pool.submit(function, argument) for argument in batch])
            if len(pending) > batches_ahead:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(threads: int) -> ThreadPoolExecutor:
    """Start threads in which PyTorch uses one core each."""
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "images", torch.set_num_threads, (1,))
    all_started = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(all_started.wait)
        all_started.wait()
    except BaseException as error:  # a signal, too: the threads would wait for ever
        all_started.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        if not isinstance(error, RuntimeError):
            raise
        raise UserError(
            f"cannot start {threads} threads that read images ({error}); a smaller --workers (predict.py: "
            "--threads) needs fewer"
        ) from None
    torch.set_num_threads(own)  # also for threads that PyTorch starts later
    return pool
