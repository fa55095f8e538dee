"""Small tools of every program: one-line errors, kinds of flags, the console, atomic files, cores."""

import argparse
import difflib
import errno
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NoReturn

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


class CommandLineParser(argparse.ArgumentParser):
    """A parser that ends the program with one line and status 2 after a mistake.

    Attributes:
        flags_elsewhere: The program of each flag that only another program has.
    """

    flags_elsewhere: Mapping[str, str] = MappingProxyType({})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; for an unknown flag, name its program or the most similar flag."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0].split('=')[0])}")
        return arguments

    def _hint(self, flag: str) -> str:
        if flag in self.flags_elsewhere:
            return f"; {flag} is a flag of {self.flags_elsewhere[flag]}"
        # Without the dashes, which would make all short flags alike.
        spellings = {spelling.lstrip("-"): spelling for spelling in self.spellings()}
        similar = difflib.get_close_matches(flag.lstrip("-"), spellings, n=1, cutoff=0.7)
        return f"; did you mean {spellings[similar[0]]}?" if similar else ""

    def spellings(self) -> list[str]:
        """Return all spellings of all flags."""
        return [spelling for action in self._actions for spelling in action.option_strings]

    def flags(self) -> dict[str, str]:
        """Return the first spelling of every flag, by the name under which its value is kept."""
        return {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and end with status 2."""
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists every flag)\n")


def _number(text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def at_least(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a converter of whole numbers from ``low`` to ``high``."""
    return _within(int, low, high)


def in_range(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return a converter of numbers from ``low`` to ``high``."""
    return _within(float, low, high)


def in_half_open_range(low: float, high: float) -> Callable[[str], float]:
    """Return a converter of numbers from ``low`` to less than ``high``."""
    return _within(float, low, math.nextafter(high, low), too_high=f"less than {high}")


def above(low: float) -> Callable[[str], float]:
    """Return a converter of numbers above ``low``."""
    return _within(float, math.nextafter(low, math.inf), math.inf, too_low=f"more than {low}")


def _within(
    kind: type, low: float, high: float, *, too_low: str | None = None, too_high: str | None = None
) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = _number(text, kind)
        if not low <= value <= high:
            allowed = too_high or f"at most {high}" if value > high else too_low or f"at least {low}"
            raise argparse.ArgumentTypeError(f"{value} is not allowed; {allowed}")
        return value

    return convert


def int_list(separator: str) -> Callable[[str], tuple[int, ...]]:
    """Return a converter of whole numbers with ``separator`` between them."""

    def convert(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(separator))
        except ValueError:
            example = separator.join("012")
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of whole numbers such as {example}"
            ) from None
        if min(values) < 0:
            raise argparse.ArgumentTypeError(f"{text!r} has a negative number")
        return values

    return convert


def float_list(text: str) -> tuple[float, ...]:
    """Convert numbers with commas between them."""
    return tuple(_number(part, float) for part in text.split(","))


def share_or_count(text: str) -> float:
    """Read a share such as ``20%`` or ``0.2``, or a whole number from 1 on."""
    value = _number(text.removesuffix("%"), float) / (100 if text.endswith("%") else 1)
    if 0 < value < 1:
        return value
    if text.endswith("%") or value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a share such as 20% nor a number of images")
    return int(value)


def user_path(text: str) -> Path:
    """Convert the name of a file or folder; ``~`` is the user's home.

    The shell leaves ``--output=~/file`` as it is. Where there is no such home, the name stays as it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name is not a file or folder")
    return Path(os.path.expanduser(text))  # noqa: PTH111, as Path.expanduser raises where there is no such home


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
