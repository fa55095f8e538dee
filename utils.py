"""Small tools every script needs: one-line errors, atomic files, seeds."""

import argparse
import ctypes
import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch

LONGEST_MESSAGE = 600  # characters
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(Exception):
    """A mistake the user can mend. The scripts print its one line and end with status 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """``text`` fit for one line of a terminal, whatever names or values it quotes."""
    text = "".join(c if c.isprintable() else "?" for c in text.replace("\n", " "))
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


def duration(seconds: float) -> str:
    """As ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(min(max(seconds, 0), 1e9))))


class CommandLineParser(argparse.ArgumentParser):
    """Answers a mistake with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists every flag)\n")


def keep_freed_memory() -> None:
    """Let the C library keep what a training step frees for the next one. By default it hands large blocks back to the system, which has to
    clear them when it gives them out again. Does nothing where the library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def set_tf32(enabled: bool) -> None:
    """Whether float32 convolutions and matrix products on GPUs may round their inputs to TensorFloat-32."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


@contextmanager
def atomic_write(path: Path, mode: str = "w", verify: Callable[[Path], None] | None = None) -> Iterator[IO]:
    """Open a temporary file that takes the place of ``path`` when the block ends: readers see the old file or the new one, never half.

    Args:
        verify: called with the complete temporary file; what it raises keeps the old file in place.

    Raises:
        UserError: the folder cannot be written or the disk is full; an old file is then untouched.
    """
    temporary = None
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device, such as /dev/null, is not for replacing
            with path.open(mode, **options) as stream:
                yield stream
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if verify is not None:
            verify(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system lets folders be synchronised."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and PyTorch; with ``deterministic`` only operations that repeat bit for bit are allowed."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that use the global state are seeded too
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
