"""The parser of command lines, which reports mistakes in one line, and converters of flags' values.

Example:
    parser = CommandLineParser(prog="program.py")
    parser.add_argument("--epochs", type=at_least(1))
"""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from utils import one_line


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
    if kind is float and not math.isfinite(value):
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


def output_file(text: str) -> Path:
    """Convert the name of a file to write: behind a symbolic link, which stays, it is what the link names."""
    path = user_path(text)
    is_link_to_file = path.is_symlink() and (path.is_file() or not path.exists())
    return Path(os.path.realpath(path)) if is_link_to_file else path


def user_path(text: str) -> Path:
    """Convert the name of a file or folder; ``~`` is the user's home.

    The shell leaves ``--output=~/file`` as it is. Where there is no such home, the name stays as it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name is not a file or folder")
    return Path(os.path.expanduser(text))  # noqa: PTH111, as Path.expanduser raises where there is no such home
