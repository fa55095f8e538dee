"""Train and evaluate every arm of the comparison for every seed; run it again and it goes on.

    python -m results.arms --data-root data/cifar100                           # the shortened schedule: hours on a CPU
    python -m results.arms --data-root data/cifar100 --schedule published      # 300 + 180 epochs on all classes

``--data-root`` holds ``train/CLASS/`` and ``test/CLASS/`` with the images of CIFAR-100. Small result files are copied into
``results/cifar100_arms/seed_N/ARM/``, or ``results/cifar100_published/``; checkpoints stay in ``--work``. ``results/tables.py`` makes the
tables and plots.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from utils import CommandLineParser

HERE = Path(__file__).resolve().parent
KEPT_FILES = ("run.json", "log.jsonl", "anytime.csv", "budgeted.csv", "optimised.csv", "curves.png")


class Schedule(NamedTuple):
    """What all arms have in common: ``every_nth_class`` by name, flags of both stages, and the folder of the results."""

    every_nth_class: int
    stage_1: list[str]
    stage_2: list[str]
    results: Path


_SHORT = ["--batch-size", "32", "--lr", "0.05", "--lr-type", "cosine"]
SCHEDULES = {
    "short": Schedule(
        5,
        ["--preset", "cifar100", "--val-size", "1000", "--epochs", "5", "--warmup-epochs", "1", *_SHORT],
        ["--epochs", "3", *_SHORT],
        HERE / "cifar100_arms",
    ),
    "published": Schedule(1, ["--preset", "cifar100"], ["--preset", "cifar100"], HERE / "cifar100_published"),
}


class Arm(NamedTuple):
    """A run: ``origin`` names the stage-1 arm it starts from, None for stage 1 itself."""

    origin: str | None
    flags: list[str]


# In order of value. The single difference between two arms is what their flags say.
ARMS = {
    "MSDNet": Arm(None, ["--no-gradient-equilibrium"]),
    "GE": Arm(None, []),
    "GE_ISC_OFA": Arm("GE", []),
    "GE_ISC": Arm("GE", ["--no-ofa"]),
    "GE_OFA": Arm("GE", ["--no-isc"]),
    "GE_classifiers": Arm("GE", ["--no-isc", "--no-ofa"]),
    "GE_ISC_OFA_T4": Arm("GE", ["--temperature", "4", "--gamma", "0.5"]),
    "GE_ISC_OFA_kl_mean": Arm("GE", ["--kl", "mean"]),
    "GE_ISC_OFA_flow": Arm("GE", ["--isc-gradient", "flow"]),
    "GE_ISC_OFA_moving": Arm("GE", ["--backbone-bn", "moving"]),
    "released_GE": Arm(None, ["--released"]),
    "released_IMTA": Arm("released_GE", ["--released"]),
    "GE_he": Arm(None, ["--init", "he"]),
    "GE_multistep": Arm(None, ["--lr-type", "multistep"]),
    "GE_batch_64": Arm(None, ["--batch-size", "64", "--lr", "0.1", "--lr-type", "multistep"]),
    "GE_plain_engine": Arm(None, ["--no-channels-last", "--no-fused-optimizer", "--amp", "off", "--no-tf32"]),
    "MSDNet_7": Arm(None, ["--preset", "cifar100-anytime", "--no-gradient-equilibrium"]),
    "GE_7": Arm(None, ["--preset", "cifar100-anytime"]),
    "GE_ISC_OFA_7": Arm("GE_7", ["--preset", "cifar100-anytime"]),
}


def command(arm: str, schedule: Schedule, seed: int, data_root: Path, work: Path) -> list[str]:
    """The command line of one run."""
    origin, flags = ARMS[arm]
    save = work / f"seed_{seed}" / arm
    common = ["--save", str(save), "--seed", str(seed), "--resume", "--save-every-steps", "100", *flags]
    if origin is None:
        return ["train_GE.py", "--data-root", str(data_root), *schedule.stage_1, *common]
    return ["train_IMTA.py", "--pretrained", str(work / f"seed_{seed}" / origin), *schedule.stage_2, *common]


def link_classes(source: Path, target: Path, every: int) -> None:
    """A data set of every ``every``-th class, without copies."""
    for part in ("train", "test"):
        (target / part).mkdir(parents=True, exist_ok=True)
        for folder in sorted(path for path in (source / part).iterdir() if path.is_dir())[::every]:
            link = target / part / folder.name
            if not link.exists():
                link.symlink_to(folder.resolve())


def main() -> int:
    parser = CommandLineParser(prog="results.arms", description="Train every arm of the comparison for every seed.")
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="CIFAR-100 as folders train/CLASS and test/CLASS")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="short", help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="runs and checkpoints (default: save/cifar100_arms, or save/cifar100_published)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="(default: all)")
    arguments = parser.parse_args()
    if not (arguments.data_root / "train").is_dir():
        parser.error(f"{arguments.data_root} has no folder train")
    schedule = SCHEDULES[arguments.schedule]
    work = arguments.work or Path("save") / schedule.results.name
    classes = work / "classes"
    link_classes(arguments.data_root, classes, schedule.every_nth_class)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            kept = schedule.results / f"seed_{seed}" / arm
            if not (kept / "anytime.csv").exists():
                words = command(arm, schedule, seed, classes, work)
                status = subprocess.run([sys.executable, *words], cwd=HERE.parent, check=False).returncode
                if status != 0:
                    return status
                kept.mkdir(parents=True, exist_ok=True)
                for name in KEPT_FILES:
                    shutil.copy(work / f"seed_{seed}" / arm / name, kept / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
