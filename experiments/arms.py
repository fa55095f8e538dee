"""Train and evaluate every arm of the comparison for every seed; resume when run again.

    python -m experiments.arms --data-root data/cifar100
    python -m experiments.arms --data-root data/cifar100 --schedule 30_epochs

Schedules, with the epochs of stages 1 and 2:

- ``short`` (the default): 5 + 3 epochs on 20 of the classes; hours on a CPU
- ``10_epochs``: 10 + 4 epochs, for trials
- ``30_epochs``: 30 + 10 epochs; an hour or two per arm
- ``100_epochs``: 100 + 40 epochs
- ``published``: 300 + 180 epochs

``--data-root`` is that of ``train_GE.py --data cifar100``: torchvision's archive, downloaded when missing, or
the folders ``train/CLASS/`` and ``test/CLASS/``. Runs and checkpoints are written to ``--work``. When a run
is complete, its small files are copied into ``seed_N/ARM/`` of the folder with the schedule's name, from
which ``experiments/tables.py`` makes the tables and plots.
"""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from engine.run_directory import RunDirectory
from image_data.archives import read_cifar
from parsing import CommandLineParser, user_path
from utils import UserError, print_error

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
KEPT_FILES = (
    "run.json",
    "log.jsonl",
    "anytime.csv",
    "budgeted.csv",
    "optimised.csv",
    "ensemble.csv",
    "curves.png",
)


class Schedule(NamedTuple):
    """What all arms share: classes, epochs and flags of both stages, and the folder of the results."""

    every_nth_class: int
    epochs: tuple[int, int]
    stage_1: list[str]
    stage_2: list[str]
    results: Path


# In float32 on every machine: most of these runs are older than the bf16 that --amp auto may choose on a CPU.
_SHORT = ["--batch-size", "32", "--lr", "0.05", "--lr-type", "cosine", "--amp", "off", "--compile", "off"]
_ONE_RECIPE = ["--batch-size", "128", "--lr-type", "cosine", "--weight-decay", "5e-4", "--nesterov"]
_SAVING = ["--save-every-steps", "100"]
SCHEDULES = {
    "short": Schedule(
        5,
        (5, 3),
        ["--preset", "cifar100", "--val-size", "1000", "--epochs", "5", "--warmup-epochs", "1", *_SHORT],
        ["--epochs", "3", *_SHORT],
        RESULTS / "short",
    ),
    **{
        f"{epochs_1}_epochs": Schedule(
            1,
            (epochs_1, epochs_2),
            [
                *("--preset", "cifar100", "--epochs", str(epochs_1), "--warmup-epochs", "1", "--lr", "0.2"),
                *_ONE_RECIPE,
            ],
            ["--epochs", str(epochs_2), "--lr", "0.1", *_ONE_RECIPE],
            RESULTS / f"{epochs_1}_epochs",
        )
        for epochs_1, epochs_2 in ((10, 4), (30, 10), (100, 40))
    },
    "published": Schedule(
        1, (300, 180), ["--preset", "cifar100"], ["--preset", "cifar100"], RESULTS / "published"
    ),
}


class Arm(NamedTuple):
    """A run: ``title`` in tables, ``origin`` the stage-1 arm it starts from, None for stage 1 itself."""

    title: str
    origin: str | None
    flags: list[str]


# In the order of training. Two arms differ by their flags alone, and in precision where --amp auto chose
# differently: ``run.json`` says so.
ARMS = {
    "MSDNet": Arm("MSDNet", None, ["--no-gradient-equilibrium"]),
    "GE": Arm("GE", None, []),
    "GE_ISC_OFA": Arm("GE + ISC + OFA", "GE", []),
    "GE_ISC": Arm("GE + ISC", "GE", ["--no-ofa"]),
    "GE_OFA": Arm("GE + OFA", "GE", ["--no-isc"]),
    "GE_classifiers": Arm("new classifiers alone, on GE", "GE", ["--no-isc", "--no-ofa"]),
    "GE_ISC_OFA_T4": Arm(
        "GE + ISC + OFA, T = 4, gamma = 0.5", "GE", ["--temperature", "4", "--gamma", "0.5"]
    ),
    "GE_ISC_OFA_kl_mean": Arm("GE + ISC + OFA, `--kl mean`", "GE", ["--kl", "mean"]),
    "GE_ISC_OFA_flow": Arm("GE + ISC + OFA, `--isc-gradient flow`", "GE", ["--isc-gradient", "flow"]),
    "GE_ISC_OFA_moving": Arm("GE + ISC + OFA, `--backbone-bn moving`", "GE", ["--backbone-bn", "moving"]),
    "released_GE": Arm("GE on the coarsest scale only (`--released`)", None, ["--released"]),
    "released_IMTA": Arm("GE + ISC + OFA, `--released`, both stages", "released_GE", ["--released"]),
    "GE_boosted": Arm("GE, boosted exits", None, ["--boosted-exits"]),
    "GE_boosted_ISC_OFA": Arm("GE, boosted exits + ISC + OFA", "GE_boosted", []),
    "GE_boosted_classifiers": Arm(
        "new classifiers alone, on GE, boosted exits", "GE_boosted", ["--no-isc", "--no-ofa"]
    ),
    "GE_smoothing": Arm("GE, label smoothing 0.1", None, ["--label-smoothing", "0.1"]),
    "GE_averaged": Arm("GE, averaged weights (decay 0.999)", None, ["--ema-decay", "0.999"]),
    "GE_he": Arm("GE, `--init he`", None, ["--init", "he"]),
    "GE_10_epochs": Arm("GE, 10 epochs", None, ["--epochs", "10"]),
    "GE_multistep": Arm("GE, `--lr-type multistep`", None, ["--lr-type", "multistep"]),
    "GE_plain_engine": Arm(
        "GE, fast settings off",
        None,
        ["--no-channels-last", "--no-fused-optimizer", "--amp", "off", "--no-tf32"],
    ),
    "GE_bf16": Arm("GE in bf16, compiled", None, ["--amp", "bf16", "--compile", "default"]),
    "GE_ISC_OFA_bf16": Arm("GE + ISC + OFA in bf16, both stages", "GE_bf16", ["--amp", "bf16"]),
    "MSDNet_7": Arm("MSDNet", None, ["--preset", "cifar100-anytime", "--no-gradient-equilibrium"]),
    "GE_7": Arm("GE", None, ["--preset", "cifar100-anytime"]),
    "GE_ISC_OFA_7": Arm("GE + ISC + OFA", "GE_7", ["--preset", "cifar100-anytime"]),
}

MAIN_ARMS = ("MSDNet", "GE", "GE_ISC_OFA")


def command(arm: str, schedule: Schedule, seed: int, data_root: Path, work: Path) -> list[str]:
    """Return the command line of one run."""
    stage_1 = ["--data-root", str(data_root), *schedule.stage_1, *_SAVING]
    return command_line(ARMS[arm], work / f"seed_{seed}" / arm, seed, stage_1, [*schedule.stage_2, *_SAVING])


def command_line(arm: Arm, run: Path, seed: int, stage_1: list[str], stage_2: list[str]) -> list[str]:
    """Return the command line that trains an arm, or resumes it.

    Args:
        arm: The arm.
        run: Directory of the run; that of the stage-1 run lies beside it.
        seed: Seed of the training.
        stage_1: Flags for all arms of stage 1.
        stage_2: Flags for all arms of stage 2.
    """
    common = ["--save", str(run), "--seed", str(seed), "--resume", *arm.flags]
    if arm.origin is None:
        return ["train_GE.py", *stage_1, *common]
    return ["train_IMTA.py", "--pretrained", str(run.parent / arm.origin), *stage_2, *common]


def choose_classes(source: Path, target: Path, every: int) -> Path:
    """Return the folder of a data set with every ``every``-th class by name; make it if it is missing.

    Args:
        source: CIFAR-100, as for --data-root.
        target: Folder for links to the folders of the classes, or for images from the archive.
        every: Distance of the chosen classes in the sorted names; 1: all classes, which stay in ``source``.

    Raises:
        UserError: ``source`` holds no CIFAR-100.
    """
    if every == 1:
        return source
    if (source / "train").is_dir():
        _link_classes(source, target, every)
    elif not target.is_dir():
        _unpack_classes(source, target, every)
    return target


def class_folders(source: Path, target: Path) -> Path:
    """Return a folder that has CIFAR-100 as ``train/CLASS/`` and ``test/CLASS/``.

    Args:
        source: CIFAR-100, as for --data-root; it is returned if it has these folders.
        target: Folder for the images of the archive otherwise.

    Raises:
        UserError: ``source`` holds no CIFAR-100.
    """
    if (source / "train").is_dir():
        return source
    if not target.is_dir():
        _unpack_classes(source, target, every=1)
    return target


def _link_classes(source: Path, target: Path, every: int) -> None:
    for part in ("train", "test"):
        (target / part).mkdir(parents=True, exist_ok=True)
        for folder in sorted(path for path in (source / part).iterdir() if path.is_dir())[::every]:
            link = target / part / folder.name
            if link.is_symlink() and link.resolve() != folder.resolve():
                link.unlink()
            if not link.is_symlink():
                link.symlink_to(folder.resolve())


def _unpack_classes(source: Path, target: Path, every: int) -> None:
    unfinished = target.with_name(f"{target.name}.unfinished")
    train, test, class_names = read_cifar("cifar100", source)
    for name, part in (("train", train), ("test", test)):
        for label in range(0, len(class_names), every):
            folder = unfinished / name / class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            for i in (part.targets == label).nonzero().flatten().tolist():
                Image.fromarray(part.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    unfinished.rename(target)


def seeds_of(arm: str, results: Path) -> list[Path]:
    """Return the folders of an arm's kept results, one per seed."""
    return sorted(path.parent for path in results.glob(f"seed_*/{arm}/anytime.csv"))


def with_origins(arms: Iterable[str], described: Mapping[str, Arm] = ARMS) -> list[str]:
    """Return the names ``arms``, each after the arm it starts from."""
    ordered = []
    for arm in arms:
        ordered += [name for name in (described[arm].origin, arm) if name is not None and name not in ordered]
    return ordered


def is_complete(run: Path) -> bool:
    """Return True if a run has been trained and evaluated.

    A run without a readable ``run.json`` counts as incomplete and resumes from its last checkpoint.
    """
    sessions = RunDirectory(run).sessions()
    return bool(sessions) and sessions[-1].get("complete") is True


def refuse_other_command(run: Path, words: list[str]) -> None:
    """Raise UserError if a run was started with other flags than these; folders may have moved."""
    recorded = RunDirectory(run).sessions()[0]["command"]
    if _flags(shlex.split(recorded)) != _flags(words):
        raise UserError(f"{run} was trained by another command, {recorded}: choose another --work")


def _flags(words: list[str]) -> list[str]:
    """Return the words of a command line behind the program, without those that name folders or resume."""
    flags = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
    for name in ("--data-root", "--save", "--pretrained"):
        if name in flags:
            del flags[flags.index(name) : flags.index(name) + 2]
    return [word for word in flags if word not in ("--resume", "--overwrite")]


def run_command(words: list[str]) -> int:
    """Run one of the programs, let it save when a signal asks to stop, and return its exit status."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    # A terminal sends Ctrl-C to both; SIGTERM comes to this process alone.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_all(schedule: Schedule, data_root: Path, work: Path, seeds: list[int], arms: list[str]) -> int:
    """Run what is not complete yet, and return the exit status of the last run."""
    classes = choose_classes(data_root, work / "classes", schedule.every_nth_class)

    def command_of(arm: str, seed: int) -> list[str]:
        return command(arm, schedule, seed, classes, work)

    return train_arms(with_origins(arms), seeds, command_of, work, schedule.results)


def train_arms(
    arms: list[str],
    seeds: list[int],
    command_of: Callable[[str, int], list[str]],
    work: Path,
    results: Path | None,
) -> int:
    """Run every arm for every seed unless it is complete, and return the exit status of the last run.

    Args:
        arms: Names of arms, each after the one it starts from.
        seeds: Seeds, one after the other.
        command_of: Function of an arm and a seed that returns the command line.
        work: Folder of the runs ``seed_N/ARM``.
        results: Folder for the small files of the runs. If None, they are kept nowhere else.
    """
    for seed in seeds:
        for arm in arms:
            run, words = work / f"seed_{seed}" / arm, command_of(arm, seed)
            if is_complete(run):
                refuse_other_command(run, words)
                sys.stdout.write(f"complete: {run}\n")
            elif status := run_command(words):
                return status
            if results is not None:
                keep_files(run, results / f"seed_{seed}" / arm)
    return 0


def keep_files(run: Path, kept: Path) -> None:
    """Copy the small files of a run into the folder of its results."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        if (run / name).exists():  # older runs lack some
            shutil.copy(run / name, kept / name)


def add_data_root(parser: CommandLineParser, required: bool = True) -> None:
    """Add the flag that names CIFAR-100."""
    parser.add_argument(
        "--data-root",
        type=user_path,
        required=required,
        metavar="DIR",
        help="as of train_GE.py --data cifar100, downloaded if missing",
    )


def main() -> int:
    """Train what the command line names, and return the exit status of the last run."""
    parser = CommandLineParser(
        prog="experiments.arms", description="Train every arm of the comparison for every seed."
    )
    add_data_root(parser)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="short", help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=user_path, metavar="DIR", help="runs and checkpoints (default: save/SCHEDULE)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(default: 1 2 3)"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=list(ARMS),
        metavar="ARM",
        help="arms to train; those they start from are added (default: all)",
    )
    arguments = parser.parse_args()
    schedule = SCHEDULES[arguments.schedule]
    work = arguments.work or Path("save") / schedule.results.name
    try:
        return train_all(schedule, arguments.data_root, work, arguments.seeds, arguments.arms)
    except UserError as error:
        print_error(f"{parser.prog}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
