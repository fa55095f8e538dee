"""Utilities of all programs: one-line errors, the console, atomic files, cores."""

import errno
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO

LONGEST_MESSAGE = 600  # characters
is_folder = os.path.isdir  # also below a folder that may not be entered, where Path.is_dir fails


class UserError(Exception):
    """A mistake that the user can fix. The programs print its one line and end with status 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def error_message(error: UserError | OSError) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, UserError):
        return str(error)
    if error.filename:
        return one_line(f"cannot read or write {error.filename}: {error.strerror}")
    return one_line(str(error.strerror or error))


def one_line(text: str) -> str:
    """Return ``text`` as one line that is safe on a terminal, whatever names or values it quotes."""
    text = "".join(c if c.isprintable() else "?" for c in text.replace("\n", " "))
    if len(text) <= LONGEST_MESSAGE:
        return text
    return f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"


def print_line(text: str, stream_name: str = "stdout") -> None:
    """Print a line at once. If the stream is closed or full, drop this line and all later ones."""
    stream = getattr(sys, stream_name)
    if stream is None:
        return
    try:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):
        # What is left in the buffer would fail again when the program ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        setattr(sys, stream_name, None)


def print_error(text: str) -> None:
    """Print a line on standard error, as ``print_line`` does on standard output."""
    print_line(text, "stderr")


def is_terminal(stream: IO[str] | None) -> bool:
    """Return True if the stream is a terminal whose lines can be overwritten."""
    try:
        return stream is not None and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def duration(seconds: float) -> str:
    """Return a time such as ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(min(max(seconds, 0), 1e9))))


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of processor cores that this process may use.

    A container's quota counts: with ``docker run --cpus 2`` on 64 cores, 64 threads would stop each other.

    Args:
        root: Where the files of the system begin.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _cpu_quota(root))))


def _cpu_quota(root: Path) -> float:
    """Return how many cores the control groups of this process allow, infinity without a limit."""
    quota = math.inf
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 has no list of controllers. A container often sees its own group as the root.
        top = root / "sys/fs/cgroup" / controllers
        folder = top / group.lstrip("/")
        for each in (folder, *folder.parents):
            quota = min(quota, _quota_of_group(each))
            if each == top:
                break
    return quota


def _quota_of_group(folder: Path) -> float:
    # Version 2 has both numbers in one file, version 1 in two; "max" and -1 stand for no limit.
    words = _text(folder / "cpu.max").split()
    words = words or (_text(folder / "cpu.cfs_quota_us") + _text(folder / "cpu.cfs_period_us")).split()
    with suppress(ValueError, ZeroDivisionError):
        used, period = map(int, words)
        if used > 0:
            return used / period
    return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that replaces ``path`` when the block ends: readers see the old or the new file.

    Args:
        path: The file to write; missing folders are made.
        mode: Mode of ``open``.

    Raises:
        UserError: The folder cannot be written or the disk is full; an old file is then untouched.
    """
    temporary = None
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        if path.is_dir():  # else noticed at the end
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a pipe or a device, such as /dev/null, is not replaced
            with path.open(mode, **options) as stream:
                yield stream
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
        with temporary.open(mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # already in place, or its folder is closed
                temporary.unlink()


def percent(value: float, num_images: int | None = None) -> str:
    """Return a percentage with the digits its images allow: none up to 100, one up to 1,000, else two."""
    digits = 2 if num_images is None else min(max(math.ceil(math.log10(max(num_images, 1))) - 2, 0), 2)
    return f"{value:.{digits}f}"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names with commas between them; of many, only the first ones."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
