"""Small tools every program needs: one-line errors, kinds of flags, atomic files. This module imports nothing heavy."""

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn

LONGEST_MESSAGE = 600  # characters
is_folder = os.path.isdir  # also below a folder that may not be entered, where Path.is_dir fails


class UserError(Exception):
    """A mistake the user can mend. The scripts print its one line and end with status 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def in_words(error: UserError | OSError) -> str:
    """One line of what went wrong."""
    if isinstance(error, UserError):
        return str(error)
    return one_line(
        f"cannot read or write {error.filename}: {error.strerror}"
        if error.filename
        else str(error.strerror or error)
    )


def one_line(text: str) -> str:
    """``text`` fit for one line of a terminal, whatever names or values it quotes."""
    text = "".join(c if c.isprintable() else "?" for c in text.replace("\n", " "))
    return (
        text
        if len(text) <= LONGEST_MESSAGE
        else f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    )


def tell(text: str, stream_name: str = "stdout") -> None:
    """A line on standard output, at once. One that nobody can read any more, as the reader left or the disk is full, is lost in silence,
    and so is all that follows."""
    stream = getattr(sys, stream_name)
    if stream is None:
        return
    try:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):
        # What is left in the buffer would fail once more when the program ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        setattr(sys, stream_name, None)


def complain(text: str) -> None:
    """The same on standard error."""
    tell(text, "stderr")


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a line of it can be written over: a terminal that knows its width."""
    try:
        return stream is not None and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def duration(seconds: float) -> str:
    """As ``1 day, 2:03:04``."""
    return str(timedelta(seconds=round(min(max(seconds, 0), 1e9))))


class CommandLineParser(argparse.ArgumentParser):
    """Answers a mistake with one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help lists every flag)\n")


def _number(text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {'a whole number' if kind is int else 'a number'}"
        ) from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def at_least(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Reads whole numbers from ``low`` to ``high``."""
    return _within(int, low, high)


def in_range(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Reads numbers from ``low`` to ``high``."""
    return _within(float, low, high)


def above(low: float) -> Callable[[str], float]:
    """Reads numbers above ``low``."""
    return _within(float, math.nextafter(low, math.inf), math.inf, f"more than {low}")


def _within(kind: type, low: float, high: float, too_low: str | None = None) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = _number(text, kind)
        if not low <= value <= high:
            allowed = f"at most {high}" if value > high else too_low or f"at least {low}"
            raise argparse.ArgumentTypeError(f"{value} is not allowed; {allowed}")
        return value

    return convert


def int_list(separator: str) -> Callable[[str], tuple[int, ...]]:
    """Reads whole numbers with ``separator`` between them."""

    def convert(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(separator))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of whole numbers such as 0{separator}1{separator}2"
            ) from None
        if min(values) < 0:
            raise argparse.ArgumentTypeError(f"{text!r} has a negative number")
        return values

    return convert


def float_list(text: str) -> tuple[float, ...]:
    """Reads numbers with commas between them."""
    return tuple(_number(part, float) for part in text.split(","))


def folder(text: str) -> Path:
    """Reads the name of a file or folder; ``~`` is the user's home."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no folder")
    return Path(text).expanduser()


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
        if path.is_dir():  # else noticed at the end
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if (
            path.exists() and not path.is_file()
        ):  # a pipe or a device, such as /dev/null, is not for replacing
            with path.open(mode, **options) as stream:
                yield stream
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
        with temporary.open(mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # it is where it belongs, or its folder is closed
                temporary.unlink()
