"""What it does to budgeted prediction when thresholds are set on held-out images seen as in training, as the released program sees them.

    python -m results.held_out --work save/cifar100_arms

For the main arms' runs that ``results.arms`` left in ``--work``, held-out images are cropped and mirrored at random before thresholds
are set by the paper's rule; ``budgeted_augmented.csv`` beside a run's other results then has the columns of its ``budgeted.csv``.
"""

import copy
import sys
from pathlib import Path

import torch

from adaptive_inference import ExitAnswers, confidence_by_exit, curve_rows, geometric_thresholds
from args import parse
from dataloader import CROP_PADDING, Data, crop_and_flip, load_data
from engine.checkpoint import Saved, load_saved
from engine.collect import collect_logits, csv_rows
from engine.distributed import Processes
from engine.report import write_csv
from models import count_operations
from results.arms import MAIN_ARMS, SCHEDULES, seeds_of
from utils import CommandLineParser, UserError

AUGMENTED = "budgeted_augmented.csv"
ONE_PROCESS = Processes(0, 1, torch.device("cpu"), ())


def data_of(saved: Saved, *flags: str) -> Data:
    """The images of a run, split as it split them; ``flags`` change its settings.

    Raises:
        UserError: they cannot be read.
    """
    settings = parse("GE", ["--evalmode", *flags]).settings(stored=saved.settings)
    return load_data(settings, ONE_PROCESS.device, None, saved.data, saved.split)


def augmented_rows(checkpoint: Path) -> list[dict]:
    """Rows of ``budgeted.csv`` for thresholds from augmented held-out images.

    Raises:
        UserError: the checkpoint or its data cannot be read.
    """
    saved = load_saved(checkpoint, {})
    data = data_of(saved)
    generator = torch.Generator().manual_seed(saved.description.seed)
    offsets = torch.randint(2 * CROP_PADDING + 1, (data.val.num_images, 2), generator=generator)
    flips = torch.randint(2, (data.val.num_images,), generator=generator, dtype=torch.bool)
    val = copy.copy(data.val)
    val.images = crop_and_flip(val.images, offsets, flips)
    collected = (collect_logits(saved.network, part, ONE_PROCESS) for part in (val, data.test))
    held_out, test = (ExitAnswers(*confidence_by_exit(logits), targets) for logits, targets in collected)
    operations = count_operations(saved.network, data.info.image_size)
    return csv_rows(curve_rows(geometric_thresholds(held_out.confidence), held_out, test, operations))


def main(argv: list[str] | None = None) -> None:
    """Evaluate the runs these arguments name (None: those of the process)."""
    parser = CommandLineParser(prog="results.held_out", description="Budgeted prediction with thresholds from augmented held-out images.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="of results.arms")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="short", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = SCHEDULES[arguments.schedule].results
    kept = [folder.relative_to(results) for arm in MAIN_ARMS for folder in seeds_of(arm, results)]
    runs = sorted(run for run in kept if (arguments.work / run / "best.safetensors").exists())
    if not runs:
        parser.error(f"{arguments.work} holds no seed_N/ARM/best.safetensors of {', '.join(MAIN_ARMS)}")
    try:
        for run in runs:
            write_csv(results / run / AUGMENTED, augmented_rows(arguments.work / run / "best.safetensors"))
            sys.stdout.write(f"{run}\n")
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
