"""Classify your own images with a trained network that stops as early as a budget allows.

    python predict.py photo.jpg folder/                              # the demo's stage-2 network, half of its operations
    python predict.py folder/ --checkpoint save/cifar100/IMTA/best.safetensors --budget 30% --format csv --output answers.csv

Thresholds come from the file policy.json beside the checkpoint, which ``--evalmode dynamic`` writes. The exit status is 0, 1 if a file was
skipped (its name is on standard error), or 2 after a mistake.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adaptive_inference.form import inference_form
from adaptive_inference.measures import RULES
from adaptive_inference.policies import Policy, PolicyCurve, read_policy
from adaptive_inference.precision import half_precision
from adaptive_inference.predictor import AdaptivePredictor
from dataloader import Normalizer
from datasets import LEFT_OUT, DataInfo, evaluation_transform, find_images, read_image
from engine.checkpoint import load_saved
from engine.report import table
from utils import CommandLineParser, UserError, atomic_write

DEFAULT_CHECKPOINT = Path("save/demo/IMTA/best.safetensors")
POLICY_NAME = "policy.json"
DEFAULT_BUDGET = (50.0, True)

COLUMNS = ("file", "class", "confidence", "exit", "operations", "milliseconds")


def main(argv: list[str] | None = None) -> int:
    """Answer the images these arguments name (None: those of the process) and return the exit status."""
    arguments = _build_parser().parse_args(argv)
    try:
        rows, skipped = _answer_all(arguments)
        _write(_formatted(rows, arguments.format), arguments.output)
    except UserError as error:
        sys.stderr.write(f"predict.py: {error}\n")
        return 2
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if skipped else 0


def choose_policy(arguments: argparse.Namespace, curve: PolicyCurve) -> Policy:
    """The policy that --accuracy, --point or --budget ask for.

    Raises:
        UserError: no point of the curve does.
    """
    if arguments.accuracy is not None:
        return curve.for_accuracy(arguments.accuracy, arguments.rule).policy
    if arguments.point is not None:
        return curve.point(arguments.point, arguments.rule).policy
    amount, is_percent = arguments.budget
    return curve.for_operations(amount / 100 * curve.operations[-1] if is_percent else amount * 1e6, arguments.rule).policy


def _answer_all(arguments: argparse.Namespace) -> tuple[list[dict], int]:
    saved = load_saved(arguments.checkpoint, {})
    info = saved.data
    if info is None:
        raise UserError(f"{arguments.checkpoint} is of the released program, which stores neither class names nor image size")
    curve = read_policy(arguments.policy or arguments.checkpoint.parent / POLICY_NAME, saved.network)
    device = _device(arguments.device)
    form = inference_form(saved.network, dtype=half_precision(device) if arguments.half else None).to(device)
    predictor = AdaptivePredictor(form, choose_policy(arguments, curve))
    normalize = Normalizer(info.mean, info.std, device, channels_last=True)
    files, complaints = find_images(arguments.paths)
    for complaint in complaints:
        sys.stderr.write(f"predict.py: {complaint}\n")
    # The first pass pays for memory and the choice of kernels.
    predictor(torch.zeros(1, 3, info.image_size, info.image_size, device=device))
    skipped, rows = sum(not complaint.startswith(LEFT_OUT) for complaint in complaints), []
    for names, images in _batches(files, info.image_size, arguments.batch_size):
        if images is not None:
            rows += _answer(predictor, normalize(images.to(device)), names, info, curve)
        else:
            skipped += len(names)
    return rows, skipped


def _answer(predictor: AdaptivePredictor, images: Tensor, names: list[Path], info: DataInfo, curve: PolicyCurve) -> list[dict]:
    began = time.perf_counter()
    prediction = predictor(images)
    classes, confidence, exits = (values.tolist() for values in prediction)  # waits for the device
    milliseconds = 1e3 * (time.perf_counter() - began) / len(names)
    return [
        {
            "file": os.fsencode(name).decode("utf-8", "replace"),
            "class": info.class_names[label],
            "confidence": round(sure, 4),
            "exit": exit + 1,
            "operations": round(curve.operations[exit]),
            "milliseconds": round(milliseconds, 3),
        }
        for name, label, sure, exit in zip(names, classes, confidence, exits, strict=True)
    ]


def _batches(files: list[Path], image_size: int, batch_size: int) -> Iterator[tuple[list[Path], Tensor | None]]:
    """Names and bytes (n, 3, H, W) of readable images; names and None for one that is not, after a line on standard error."""
    transform = evaluation_transform(image_size)
    names, images = [], []
    for path in files:
        try:
            image = read_image(path, transform)
        except UserError as error:
            sys.stderr.write(f"predict.py: {error}; skipped\n")
            yield [path], None
            continue
        names.append(path)
        images.append(image)
        if len(names) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if names:
        yield names, torch.stack(images)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _formatted(rows: list[dict], format: str) -> str:
    if format == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    if format == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    cells = [
        [
            *(_printable(row["file"]), _printable(row["class"]), f"{row['confidence']:.3f}"),
            *(str(row["exit"]), f"{row['operations'] / 1e6:.2f} M", f"{row['milliseconds']:.2f}"),
        ]
        for row in rows
    ]
    if not cells:
        return ""
    return table(["file", "class", "confidence", "exit", "operations", "mean ms"], cells) + "\n"


def _printable(text: str) -> str:
    """A file's name must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_write(output) as stream:
        stream.write(text)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandLineParser(
        prog="predict.py", description="Classify images, each with as much of the network as it needs.", allow_abbrev=False
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of images")
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="FILE", help="of either stage (default: %(default)s)"
    )
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help=f"thresholds for this network (default: {POLICY_NAME} beside the checkpoint)"
    )
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument(
        "--budget",
        type=_budget,
        default=DEFAULT_BUDGET,
        metavar="OPERATIONS",
        help="mean operations an image, in millions (12.5) or in percent of the whole network (40%%) (default: 50%%)",
    )
    wanted.add_argument("--accuracy", type=_percentage, metavar="PERCENT", help="the cheapest policy with this accuracy on held-out images")
    wanted.add_argument("--point", type=_positive, metavar="P", help="the policy of this number on the curve")
    parser.add_argument("--rule", choices=list(RULES), help="only thresholds found by this rule (default: optimised ones if there are any)")
    parser.add_argument("--format", choices=["table", "csv", "json"], default="table", help="of the answers (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the answers there (default: standard output)")
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=64,
        metavar="N",
        help="images at a time; all get their mean time (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the first GPU, or the CPU)")
    parser.add_argument("--half", action="store_true", help="16-bit numbers where the device is faster with them")
    return parser


def _budget(text: str) -> tuple[float, bool]:
    is_percent = text.endswith("%")
    try:
        amount = float(text.removesuffix("%"))
    except ValueError:
        amount = math.nan
    if not 0 < amount <= (100 if is_percent else sys.float_info.max):
        raise argparse.ArgumentTypeError(f"{text!r} is neither millions of operations (12.5) nor a percentage up to 100 (40%)")
    return amount, is_percent


def _percentage(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return value


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
