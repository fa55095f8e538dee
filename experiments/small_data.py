"""Training on few images: four classes of CIFAR-100, 30 training images each, all 400 test images.

    python -m experiments.small_data --data-root data/cifar100 --weights tf_efficientnet_lite0.safetensors

Three ways: MSDNet from scratch; the shipped ``imta_cifar100``, which was trained on CIFAR-100 and so knows
these classes already; and a network pretrained on ImageNet. A seed chooses the training images and seeds
the training. Prints a table in Markdown.
"""

import sys
from pathlib import Path

from engine.report import read_csv
from experiments.arms import add_data_root, class_folders, is_complete, refuse_other_command, run_command
from experiments.markdown import markdown_table, spread
from parsing import CommandLineParser, user_path
from utils import UserError, error_message, print_error

CLASSES = ("bicycle", "castle", "lion", "rose")
TRAINING_IMAGES = 30
WAYS = {
    "MSDNet from scratch": ["--image-size", "32"],
    "fine-tuned `imta_cifar100` (it knows these classes)": ["--pretrained", "imta_cifar100"],
    "fine-tuned EfficientNet-lite0 (ImageNet)": ["--arch", "timm/tf_efficientnet_lite0"],
}


def link_images(source: Path, target: Path, seed: int) -> Path:
    """Make folders of links: the training images that ``seed`` chooses, and all test images."""
    for part in ("train", "test"):
        for name in CLASSES:
            folder = target / part / name
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted((source / part / name).iterdir())
            chosen = files[(seed - 1) * TRAINING_IMAGES :][:TRAINING_IMAGES] if part == "train" else files
            for file in chosen:
                link = folder / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    return target


def run_all(
    data_root: Path, weights: Path, work: Path, seeds: list[int], more: list[str]
) -> dict[str, list[list[float]]]:
    """Train every way with every seed; return top-1 of all exits by way, one list per seed."""
    results: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    folders = class_folders(data_root, work / "cifar100")
    for seed in seeds:
        images = link_images(folders, work / f"images_{seed}", seed)
        for number, (way, flags) in enumerate(WAYS.items()):
            save = work / f"seed_{seed}" / str(number) / "GE"
            words = [
                *("train_GE.py", "--data-root", str(images), "--save", str(save), "--seed", str(seed)),
                *flags,
            ]
            words += ["--pretrained", str(weights)] if "--arch" in flags else []
            words += ["--val-size", "24", "--batch-size", "16", *more]
            if is_complete(save):
                refuse_other_command(save, words)
            elif status := run_command([*words, "--overwrite"]):
                sys.exit(status)
            results[way].append([row["acc1"] for row in read_csv(save / "anytime.csv")])
    return results


def main(argv: list[str] | None = None) -> int:
    """Train and print the table."""
    parser = CommandLineParser(
        prog="experiments.small_data",
        description=__doc__.splitlines()[0],
        epilog="Further flags go to train_GE.py.",
        allow_abbrev=False,
    )
    add_data_root(parser)
    parser.add_argument(
        "--weights",
        type=user_path,
        required=True,
        metavar="FILE",
        help="weights of tf_efficientnet_lite0, written by examples/efficientnet_lite.py",
    )
    parser.add_argument(
        "--work",
        type=user_path,
        default=Path("save/small_data"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(default: 1 2 3)"
    )
    arguments, more = parser.parse_known_args(argv)
    try:
        results = run_all(arguments.data_root, arguments.weights, arguments.work, arguments.seeds, more)
    except (UserError, OSError) as error:
        print_error(f"{parser.prog}: {error_message(error)}")
        return 2
    rows = [
        [way, *(spread([exits[k] for exits in by_seed], digits=1) for k in (0, -1))]
        for way, by_seed in results.items()
    ]
    print(markdown_table(["training", "first exit", "last exit"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
