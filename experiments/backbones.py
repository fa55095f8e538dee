"""A pretrained network on CIFAR-100: exits alone, joint training, and what the paper adds.

    python examples/efficientnet_lite.py --output tf_efficientnet_lite0.safetensors      # once, see there
    python -m experiments.backbones --data-root data/cifar100 --weights tf_efficientnet_lite0.safetensors
    python -m experiments.backbones --table        # of what is complete

``--data-root`` holds the folders ``train/CLASS/`` and ``test/CLASS/``; images are enlarged to 64 pixels.
Run it again and it resumes. When a run is complete, its small files are copied into
``results/backbones/seed_N/ARM/``.
"""

import shutil
import sys
from pathlib import Path

from engine.report import read_csv
from experiments.arms import KEPT_FILES, RESULTS, Arm, is_complete, run_command
from utils import CommandLineParser, user_path

FOLDER = RESULTS / "backbones"
ARCH = "timm/tf_efficientnet_lite0"
STAGE_1 = [
    *("--data", "cifar100", "--arch", ARCH, "--exits", "4", "--image-size", "64", "--val-size", "5000"),
    *("--epochs", "8", "--warmup-epochs", "0.5", "--batch-size", "64", "--lr", "0.05", "--lr-type", "cosine"),
    *("--nesterov", "--weight-decay", "1e-4", "--pretrained-lr-factor", "0.4", "--compile", "off"),
]
STAGE_2 = [
    *("--epochs", "3", "--warmup-epochs", "0", "--batch-size", "64", "--lr", "0.05", "--lr-type", "cosine"),
    *("--nesterov", "--weight-decay", "1e-4", "--compile", "off"),
]
# In the order in which they are trained.
ARMS = {
    "GE": Arm("GE", None, []),
    "joint": Arm("joint training without GE", None, ["--no-gradient-equilibrium"]),
    "exits": Arm("exits alone on the frozen network", None, ["--freeze", "backbone"]),
    "GE_ISC_OFA": Arm("GE + ISC + OFA", "GE", []),
    "GE_boosted": Arm("GE, boosted exits", None, ["--boosted-exits"]),
}


def command(arm: str, seed: int, data_root: Path, weights: Path, work: Path) -> list[str]:
    """Return the command line of one run."""
    _, origin, flags = ARMS[arm]
    save = ["--save", str(work / f"seed_{seed}" / arm), "--seed", str(seed), "--resume"]
    save += ["--save-every-minutes", "10"]
    if origin is None:
        data = ["--data-root", str(data_root), "--pretrained", str(weights)]
        return ["train_GE.py", *data, *STAGE_1, *save, *flags]
    return ["train_IMTA.py", "--pretrained", str(work / f"seed_{seed}" / origin), *STAGE_2, *save, *flags]


def train_all(
    arms: list[str], seeds: list[int], data_root: Path, weights: Path, work: Path, more: list[str]
) -> int:
    """Run what is not complete, with ``more`` flags for all, and return the exit status of the last run."""
    for seed in seeds:
        for arm in arms:
            run, kept = work / f"seed_{seed}" / arm, FOLDER / f"seed_{seed}" / arm
            if not is_complete(run) and (
                status := run_command([*command(arm, seed, data_root, weights, work), *more])
            ):
                return status
            if more:  # a trial
                continue
            kept.mkdir(parents=True, exist_ok=True)
            for name in KEPT_FILES:
                if (run / name).exists():
                    shutil.copy(run / name, kept / name)
    return 0


def table(folder: Path) -> list[str]:
    """Return a table in Markdown, a row per run: top-1 of every exit, and within half of the operations."""
    rows = []
    for arm, described in ARMS.items():
        for run in sorted(folder.glob(f"seed_*/{arm}")):
            exits = [row["acc1"] for row in read_csv(run / "anytime.csv")]
            full = read_csv(run / "anytime.csv")[-1]["operations"]
            affordable = [
                row for row in read_csv(run / "budgeted.csv") if row["val_operations"] <= 0.5 * full
            ]
            # The budget that is best on held-out images.
            chosen = max(affordable, key=lambda row: row["val_acc1"], default=None)
            half = f"{chosen['test_acc1']:.2f}" if chosen else "-"
            cells = [described.title, run.parent.name[5:], *(f"{acc1:.2f}" for acc1 in exits)]
            rows.append(f"| {' | '.join([*cells, f'{sum(exits) / len(exits):.2f}', half])} |")
    count = len(rows[0].split("|")) - 6 if rows else 4
    names = ["training", "seed", *(f"exit {k + 1}" for k in range(count)), "mean", "half of the operations"]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows]


def main(argv: list[str] | None = None) -> int:
    """Train, or print the table."""
    parser = CommandLineParser(prog="experiments.backbones", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-root", type=user_path, metavar="DIR", help="CIFAR-100 as folders train/ and test/"
    )
    parser.add_argument("--weights", type=user_path, metavar="FILE", help=f"of {ARCH}")
    parser.add_argument(
        "--work", type=user_path, default=Path("save/backbones"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="(default: all)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the kept results")
    arguments, more = parser.parse_known_args(argv)
    if arguments.table:
        sys.stdout.write("\n".join(table(FOLDER)) + "\n")
        return 0
    if arguments.data_root is None or arguments.weights is None:
        parser.error("--data-root and --weights are needed")
    arms = list(ARMS) if not arguments.arms else [arm for arm in ARMS if arm in arguments.arms]
    if "GE_ISC_OFA" in arms and "GE" not in arms:
        arms.insert(0, "GE")
    return train_all(arms, arguments.seeds, arguments.data_root, arguments.weights, arguments.work, more)


if __name__ == "__main__":
    sys.exit(main())
