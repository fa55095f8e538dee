"""Measure the drift alarm, and what corruptions cost each exit, on the test images of a network.

    python -m experiments.drift imta_cifar100 --data-root data/cifar100

Streams of 2,000 test images are drawn without replacement and predicted at about half of the operations.
False alarms: 1,000 streams of clean images; they overlap, so their share is a check beside the guaranteed
bound, and no estimate. Delays: 20 streams for each corruption and strength. The first run computes the logits
of all exits for every corruption, which takes half an hour on one core; later runs read them from the cache
folder.
"""

import hashlib
import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptive_inference import fold, read_policy, simulate
from adaptive_inference.fingerprint import network_fingerprint
from adaptive_inference.policies import Point
from adaptive_inference.policy_files import policy_path
from adaptive_inference.promises.drift import (
    FALSE_ALARM_PROBABILITY,
    DriftAlarm,
    read_reference,
    reference_path,
)
from dataloader import Data
from engine.checkpoint import load_saved
from engine.report import write_csv
from experiments.corruptions import CORRUPTIONS, rows_table
from experiments.network_data import load_own_data
from models import ExitNetwork
from models.normalizer import Normalizer
from parsing import CommandLineParser, user_path
from utils import UserError, atomic_write

STREAM_LENGTH = 2_000
BATCH_SIZE = 250


class CorruptedImages:
    """Test images, and the logits of a network for every corruption of them, kept in a folder.

    Args:
        network: The network that predicts.
        data: The data set of the images.
        cache: Folder of the logits.
        name: Name of the network, for file names.
        limit: Number of images, evenly spread.
    """

    def __init__(self, network: ExitNetwork, data: Data, cache: Path, name: str, limit: int | None):
        count = data.test.num_images
        chosen = torch.linspace(0, count - 1, min(limit or count, count)).long()
        self.network, self.cache = network, cache
        self.images = torch.stack([data.test.image(i) for i in chosen.tolist()])
        of_images = hashlib.sha256(self.images.numpy()).hexdigest()[:8]
        self.name = f"{name}_{network_fingerprint(network)[:8]}_{len(chosen)}_{of_images}"
        self.targets = torch.cat([targets for _, targets in data.test])[chosen]
        self.normalize = Normalizer(data.info.mean, data.info.std, torch.device("cpu"))

    def logits(self, corruption: str | None, strength: float = 0.0) -> Tensor:
        """Return logits (K, N, C) of the images with a corruption, or None for the clean images."""
        case = "clean" if corruption is None else f"{corruption}_{strength:g}"
        path = self.cache / f"{self.name}_{case}.pt"
        if path.exists():
            return torch.load(path, weights_only=True).float()
        images = self.images if corruption is None else CORRUPTIONS[corruption].apply(self.images, strength)
        with torch.inference_mode():
            batches = images.split(BATCH_SIZE)
            logits = [torch.stack(self.network(self.normalize(batch))).half() for batch in batches]
        logits = torch.cat(logits, dim=1)
        with atomic_write(path, "wb") as stream:
            torch.save(logits, stream)
        return logits.float()


def fired_after(reference: Tensor, scores: Tensor, streams: int, seed: int) -> list[int | None]:
    """Draw streams from scores (N,), and return after how many images each fired, None if never."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for stream in range(streams):
        order = torch.randperm(len(scores), generator=generator)[:STREAM_LENGTH]
        alarm = DriftAlarm(reference, seed=stream)
        alarm.update(scores[order])
        results.append(alarm.fired_after)
    return results


def corruption_rows(images: CorruptedImages, point: Point, reference: Tensor, streams: int) -> list[dict]:
    """Evaluate every corruption and strength, after the clean images.

    Returns:
        One dict per case: ``corruption``, ``strength``, ``exit_1`` .. ``exit_K`` (top-1 in percent of each
        exit for all images), ``policy`` (of the policy), ``lost`` (its points below the clean images), and,
        except for clean images, ``fired`` (streams of ``streams``) and ``median_images`` (until it fires;
        infinite if most do not).
    """
    rows = []
    cases = [
        (name, strength) for name, corruption in CORRUPTIONS.items() for strength in corruption.strengths
    ]
    for name, strength in [(None, 0.0), *cases]:
        logits = images.logits(name, strength)
        prediction = simulate(logits, point.policy)
        by_exit = (logits.argmax(dim=2) == images.targets).double().mean(dim=1).mul(100).tolist()
        right = (prediction.classes == images.targets).double().mean().mul(100).item()
        row = {"corruption": name or "none", "strength": strength}
        row |= {f"exit_{k}": round(acc1, 2) for k, acc1 in enumerate(by_exit, start=1)}
        row |= {"policy": round(right, 2), "lost": round((rows[0]["policy"] if rows else right) - right, 2)}
        if name is not None:
            fired = fired_after(reference, prediction.log_sum_exp, streams, seed=len(rows))
            row["fired"] = sum(after is not None for after in fired)
            row["median_images"] = float(np.median([after or np.inf for after in fired]))
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the tables for these arguments (those of the process if None), and return the exit status."""
    parser = CommandLineParser(prog="experiments.drift", description="Test the drift alarm.")
    parser.add_argument(
        "network", type=user_path, metavar="NETWORK", help="a run, a file or a name in weights/"
    )
    parser.add_argument(
        "--data-root", type=user_path, metavar="DIR", help="the network's data set (default: data)"
    )
    parser.add_argument("--clean-streams", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--streams", type=int, default=20, metavar="N", help="per strength (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only N test images, evenly spread (default: all)"
    )
    parser.add_argument(
        "--cache",
        type=user_path,
        default=Path("save/drift"),
        metavar="DIR",
        help="for logits (default: %(default)s)",
    )
    parser.add_argument("--csv", type=user_path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(argv)
    try:
        measure(arguments)
    except UserError as error:
        sys.stderr.write(f"experiments.drift: {error}\n")
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Print the tables that the arguments ask for.

    Raises:
        UserError: The network, its policies or its images cannot be read, or a file cannot be written.
    """
    saved = load_saved(arguments.network)
    data = load_own_data(saved, arguments.data_root, "anytime")
    policy_file = policy_path(saved.path)
    curve = read_policy(policy_file, saved.network)
    point = curve.default_point()
    reference = read_reference(reference_path(policy_file), curve).scores(point.policy)
    images = CorruptedImages(fold(saved.network), data, arguments.cache, saved.path.stem, arguments.limit)
    clean = simulate(images.logits(None), point.policy).log_sum_exp
    fired = fired_after(reference, clean, arguments.clean_streams, seed=0)
    num_false = sum(after is not None for after in fired)
    sys.stdout.write(
        f"{len(clean):,} test images, policy {point.number} of the {point.rule} rule, "
        f"{len(reference):,} reference images\n"
        f"false alarms: {num_false} of {len(fired):,} streams of {min(STREAM_LENGTH, len(clean)):,} clean "
        f"images ({100 * num_false / len(fired):.1f} %; the bound is {100 * FALSE_ALARM_PROBABILITY:g} %)\n"
    )
    alarm = DriftAlarm(reference)
    alarm.update(clean[images.targets.argsort(stable=True)])
    after = "no alarm" if alarm.fired_after is None else f"an alarm after {alarm.fired_after} images"
    sys.stdout.write(f"clean images sorted by class: {after}\n")
    rows = corruption_rows(images, point, reference, arguments.streams)
    for lost in (8, 12):
        if medians := [row["median_images"] for row in rows[1:] if row["lost"] >= lost]:
            sys.stdout.write(f"where {lost} or more points are lost, medians are at most {max(medians):g}\n")
    titles = {"corruption": "corruption", "strength": "strength"}
    delays = {
        "lost": "points lost",
        "fired": f"fired, of {arguments.streams}",
        "median_images": "images, median",
    }
    exits = {f"exit_{k}": f"exit {k}" for k in range(1, saved.network.num_exits + 1)}
    accuracy = titles | exits | {"policy": "policy nearest to half"}
    sys.stdout.write(f"\n{rows_table(rows[1:], titles | delays)}\n\n{rows_table(rows, accuracy)}\n")
    if arguments.csv:
        write_csv(arguments.csv, [{name: row[name] for name in accuracy} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
