"""Rows of answers as they come, as a table, CSV or JSON, on standard output or into a file.

with opened(None) as stream:
    writer = WRITERS["csv"](stream, class_names, about={"model": "..."})
    writer.rows([{"file": "a.png", ...}])
    writer.end({"images": 1})
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils import UserError, atomic_write, one_line

COLUMNS = ("file", "class", "confidence", "exit", "operations", "network_milliseconds")


class _Writer:
    """Knows its class names, and what the answers are about, from the start; a format without a place for the summary drops it."""

    stream: IO[str]
    row: Callable[[dict], object]

    def rows(self, rows: list[dict]) -> None:
        for row in rows:
            self.row(row)
        self.stream.flush()

    def end(self, summary: dict[str, Any]) -> None: ...


class _Table(_Writer):
    """Columns of fixed width; the file, of any length, comes last. Its name must not steer the terminal."""

    def __init__(self, stream: IO[str], class_names: list[str], about: dict[str, Any]):
        self.stream, self.width = stream, min(max(map(len, class_names)), 30)
        stream.write(f"{'class':>{self.width}}  confidence  exit  operations  network ms  file\n")

    def row(self, row: dict) -> None:
        self.stream.write(
            f"{one_line(row['class']):>{self.width}}  {row['confidence']:10.3f}  {row['exit']:4d}  {row['operations'] / 1e6:8.2f} M  "
            f"{row['network_milliseconds']:10.2f}  {one_line(row['file'])}\n"
        )


class _Csv(_Writer):
    def __init__(self, stream: IO[str], class_names: list[str], about: dict[str, Any]):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        self.stream, self.row = stream, writer.writerow


class _Json(_Writer):
    """One object: what is known about the answers, ``answers``, a line each, and ``summary``."""

    def __init__(self, stream: IO[str], class_names: list[str], about: dict[str, Any]):
        self.stream, self.separator = stream, "\n"
        stream.write(f'{json.dumps(about, ensure_ascii=False)[:-1]}, "answers": [')

    def row(self, row: dict) -> None:
        self.stream.write(f"{self.separator} {json.dumps(row, ensure_ascii=False)}")
        self.separator = ",\n"

    def end(self, summary: dict[str, Any]) -> None:
        self.stream.write(f'\n], "summary": {json.dumps(summary)}}}\n')


WRITERS = {"table": _Table, "csv": _Csv, "json": _Json}


@contextmanager
def opened(output: Path | None) -> Iterator[IO[str]]:
    """The file, or standard output, whose faults become one line."""
    if output is not None:
        with atomic_write(output) as stream:
            yield stream
        return
    if sys.stdout is None:
        raise UserError("standard output is closed; --output FILE writes the answers to a file")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What the stream still holds must not be tried again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write the answers: {error.strerror}") from None
