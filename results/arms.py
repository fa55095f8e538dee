"""Train and evaluate every arm of the comparison on a shortened schedule, for every seed; run it again and it goes on.

    python -m results.arms --data-root data/cifar100 --work save/arms

``--data-root`` holds ``train/CLASS/`` and ``test/CLASS/`` with the images of CIFAR-100. Small result files are copied into
``results/cifar100_arms/seed_N/ARM/``; checkpoints stay in ``--work``. ``results/tables.py`` makes the tables and plots.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "cifar100_arms"
KEPT_FILES = ("run.json", "log.jsonl", "anytime.csv", "budgeted.csv", "optimised.csv", "curves.png")
EVERY_NTH_CLASS = 5  # 20 of 100, in the order of their names

SCHEDULE = ["--batch-size", "32", "--lr", "0.05", "--lr-type", "cosine"]
STAGE_1 = ["--preset", "cifar100", "--val-size", "1000", "--epochs", "5", "--warmup-epochs", "1", *SCHEDULE]
STAGE_2 = ["--epochs", "3", *SCHEDULE]


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
    "released_GE": Arm(None, ["--released"]),
    "released_IMTA": Arm("released_GE", ["--released"]),
    "GE_plain_engine": Arm(None, ["--no-channels-last", "--no-fused-optimizer", "--amp", "off", "--no-tf32"]),
    "MSDNet_7": Arm(None, ["--preset", "cifar100-anytime", "--no-gradient-equilibrium"]),
    "GE_7": Arm(None, ["--preset", "cifar100-anytime"]),
    "GE_ISC_OFA_7": Arm("GE_7", []),
}


def command(arm: str, seed: int, data_root: Path, work: Path) -> list[str]:
    """The command line of one run."""
    origin, flags = ARMS[arm]
    save = work / f"seed_{seed}" / arm
    common = ["--save", str(save), "--seed", str(seed), "--resume", "--save-every-steps", "100", *flags]
    if origin is None:
        return ["train_GE.py", "--data-root", str(data_root), *STAGE_1, *common]
    return ["train_IMTA.py", "--pretrained", str(work / f"seed_{seed}" / origin), *STAGE_2, *common]


def link_classes(source: Path, target: Path) -> None:
    """A data set of every fifth class, without copies."""
    for part in ("train", "test"):
        (target / part).mkdir(parents=True, exist_ok=True)
        for folder in sorted(path for path in (source / part).iterdir() if path.is_dir())[::EVERY_NTH_CLASS]:
            link = target / part / folder.name
            if not link.exists():
                link.symlink_to(folder.resolve())


def main() -> int:
    parser = argparse.ArgumentParser(prog="results.arms", description="Train every arm of the comparison for every seed.")
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="CIFAR-100 as folders train/CLASS and test/CLASS")
    parser.add_argument("--work", type=Path, default=Path("save/arms"), metavar="DIR", help="runs and checkpoints (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(default: 1 2 3)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="(default: all)")
    arguments = parser.parse_args()
    if not (arguments.data_root / "train").is_dir():
        parser.error(f"{arguments.data_root} has no folder train")
    classes = arguments.work / "classes"
    link_classes(arguments.data_root, classes)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            kept = RESULTS / f"seed_{seed}" / arm
            if not (kept / "anytime.csv").exists():
                status = subprocess.run(
                    [sys.executable, *command(arm, seed, classes, arguments.work)], cwd=HERE.parent, check=False
                ).returncode
                if status != 0:
                    return status
                kept.mkdir(parents=True, exist_ok=True)
                for name in KEPT_FILES:
                    shutil.copy(arguments.work / f"seed_{seed}" / arm / name, kept / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
