r"""Rows of predictions as a table, CSV or JSON, written as they come to standard output or into a file.

Example:
    with open_output(None) as stream:
        writer = WRITERS["csv"](stream, class_names, metadata={"model": "..."})
        writer.rows([{"file": "a.png", ...}])
        writer.end({"images": 1})

Where the output's encoding lacks a character, the table and CSV have an escape such as ``\xe9``, JSON one
such as ``\u00e9``.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adaptive_inference.predictor import Prediction
from utils import UserError, atomic_write, one_line

BEST_CLASSES = 5  # of each image, in JSON
COLUMNS = ("file", "class", "confidence", "exit", "operations", "network_milliseconds")


def prediction_rows(
    names: list[Path],
    prediction: Prediction,
    milliseconds: float,
    operations: list[int],
    class_names: list[str],
) -> list[dict[str, Any]]:
    """Return a row for each of n images.

    Args:
        names: The files, n.
        prediction: Their prediction, on the CPU.
        milliseconds: Time in the network of all images together.
        operations: Operations to each exit.
        class_names: Names of all classes.
    """
    # First the predicted class: ``topk`` orders equal probabilities in another way.
    ranked = prediction.probs.scatter(1, prediction.classes[:, None], float("inf"))
    best = ranked.topk(min(BEST_CLASSES, len(class_names))).indices
    probabilities = prediction.probs.gather(1, best)
    rows = []
    for i, name in enumerate(names):
        # Not a dictionary: two classes may have the same name.
        top5 = [
            {"class": class_names[k], "index": k, "confidence": round(probability, 4)}
            for k, probability in zip(best[i].tolist(), probabilities[i].tolist(), strict=True)
        ]
        k = int(prediction.exits[i])
        rows.append(
            {
                "file": text_of_path(name),
                "class": top5[0]["class"],
                "confidence": top5[0]["confidence"],
                "exit": k + 1,
                "operations": operations[k],
                "network_milliseconds": round(milliseconds / len(names), 3),
                "top5": top5,
            }
        )
    return rows


def text_of_path(path: Path) -> str:
    """Return a path as text for the output; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


class _Writer:
    """Base class: a format without a place for ``metadata`` and for the summary drops them."""

    stream: IO[str]
    row: Callable[[dict], object]

    def rows(self, rows: list[dict]) -> None:
        """Write rows at once."""
        for row in rows:
            self.row(row)
        self.stream.flush()

    def end(self, summary: dict[str, Any]) -> None:
        """Write what follows the last row."""


class _Table(_Writer):
    """Columns of fixed width; the file, of any length, comes last."""

    def __init__(self, stream: IO[str], class_names: list[str], metadata: dict[str, Any]):
        self.stream, self.width = stream, min(max(map(len, class_names)), 30)
        stream.write(f"{'class':>{self.width}}  confidence  exit  operations  network ms  file\n")

    def row(self, row: dict) -> None:
        """Write a row."""
        name, file = one_line(row["class"]), one_line(row["file"])  # which may not steer the terminal
        self.stream.write(
            f"{name:>{self.width}}  {row['confidence']:10.3f}  {row['exit']:4d}  "
            f"{row['operations'] / 1e6:8.2f} M  {row['network_milliseconds']:10.2f}  {file}\n"
        )


class _Csv(_Writer):
    """Comma-separated values, of ``COLUMNS`` alone."""

    def __init__(self, stream: IO[str], class_names: list[str], metadata: dict[str, Any]):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        self.stream, self.row = stream, writer.writerow


class _Json(_Writer):
    """One object: ``metadata``'s entries, ``predictions``, one per line, and ``summary``."""

    def __init__(self, stream: IO[str], class_names: list[str], metadata: dict[str, Any]):
        self.stream, self.separator = stream, "\n"
        self.is_ascii = not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        stream.write(f'{self._text(metadata)[:-1]}, "predictions": [')

    def row(self, row: dict) -> None:
        """Write a row."""
        self.stream.write(f"{self.separator} {self._text(row)}")
        self.separator = ",\n"

    def end(self, summary: dict[str, Any]) -> None:
        """Write the summary."""
        self.stream.write(f'\n], "summary": {self._text(summary)}}}\n')

    def _text(self, content: dict[str, Any]) -> str:
        return json.dumps(content, ensure_ascii=self.is_ascii, allow_nan=False)


WRITERS = {"table": _Table, "csv": _Csv, "json": _Json}


@contextmanager
def open_output(path: Path | None) -> Iterator[IO[str]]:
    """Open a file, or standard output for None.

    Raises:
        UserError: The output cannot be written.
        BrokenPipeError: The reader of standard output has closed it.
    """
    if path is not None:
        with atomic_write(path) as stream:
            yield stream
        return
    if sys.stdout is None:
        raise UserError("standard output is closed; --output FILE writes the predictions to a file")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What the stream still holds must not be tried again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write the predictions: {error.strerror}") from None
