"""The work of predict.py: load a network, choose a policy, read images, predict, and write rows as they come.

Example:
    options = predict.parse(["folder/", "--budget", "2ms"])
    status = predict_all(options, Path("save/demo/IMTA/best.safetensors"))
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adaptive_inference.calibration import ensemble_operations
from adaptive_inference.policy_files import policy_path, read_policy
from adaptive_inference.predictor import AdaptivePredictor, NotFiniteError, Prediction
from adaptive_inference.promises.drift import DriftAlarm, read_reference, reference_path
from engine.checkpoint import load_saved
from engine.device import is_out_of_memory, limit_threads
from engine.predictor_choice import choose_predictor
from engine.rows import WRITERS, open_output
from image_data.folders import LEFT_OUT, find_images
from image_data.parts import SMALL_IMAGE_SIZE
from image_data.reading import read_image
from image_data.transforms import evaluation_transform
from models import ExitNetwork, count_operations
from models.description import DataInfo
from models.files import WEIGHTS
from utils import UserError, is_terminal, print_error

BATCH_SIZE = 64
WARM_UP_IMAGES = 8
BEST_CLASSES = 5
SHOWN_CLASSES = 3
SAMPLED_FILES = 9  # whose size is compared with that of the network's images
FAR_SIZES_RATIO = 3


def predict_all(arguments: argparse.Namespace, path: Path) -> int:
    """Predict the classes of the images that the command line of predict.py names.

    Args:
        arguments: Parsed command line of predict.py.
        path: The network's file.

    Returns:
        The exit status.

    Raises:
        UserError: One line: the network, its policy, a flag or the output is impossible, or memory is short.
    """
    try:
        return _predict_all(arguments, path)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for so many images at a time; a smaller --batch-size needs less"
        ) from None


def _predict_all(arguments: argparse.Namespace, path: Path) -> int:
    device, network = _device(arguments.device), load_saved(path).network
    batch_size = arguments.batch_size or (BATCH_SIZE if arguments.deadline is None else 1)
    limit_threads(arguments.threads, batch_size * network.description.operations[-1])
    choice = choose_predictor(arguments, path, network.to(device), batch_size)
    alarm = _drift_alarm(arguments, path, choice.predictor) if arguments.drift_alarm else None
    tally = Tally(choice.predictor, arguments.deadline, alarm)
    files, complaints = find_images(arguments.paths)
    skipped = sum(not complaint.startswith(LEFT_OUT) for complaint in complaints)
    is_interrupted = False
    with open_output(arguments.output) as stream, _progress_bar(arguments, len(files)) as bar:
        about = {"model": str(path), "policy": choice.about}
        for line in (*_about_network(arguments, path, network, files), choice.line, *complaints):
            _say(line)
        writer = WRITERS[arguments.format](stream, tally.data.class_names, about)
        try:
            for names, images in _batches(files, tally.data, batch_size):
                rows = [] if images is None else tally.predict(names, images.to(device))
                writer.rows(rows)
                skipped += len(names) - len(rows)
                bar.update(len(names))
        except KeyboardInterrupt:
            is_interrupted = True
        summary = tally.summary()
        writer.end(summary)
    _say(_in_words(summary))
    if is_interrupted:
        _say(f"interrupted; the {summary['images']} predictions so far are kept")
        return 130
    if skipped:
        return 1
    return 3 if alarm is not None and alarm.fired_after else 0


def _drift_alarm(arguments: argparse.Namespace, path: Path, predictor: AdaptivePredictor) -> DriftAlarm:
    source = arguments.policy or policy_path(path)
    reference = read_reference(reference_path(source), read_policy(source))
    return DriftAlarm(reference.scores(predictor.policy))


class Tally:
    """Predicts batches, makes a row of each prediction, and counts them.

    Args:
        predictor: A predictor whose network has a description.
        deadline: For each batch in milliseconds, None without one.
        alarm: Sees every prediction, and is reported once when it fires.
    """

    def __init__(self, predictor: AdaptivePredictor, deadline: float | None, alarm: DriftAlarm | None = None):
        self.alarm = alarm
        self.predictor, self.data, self.deadline = predictor, predictor.network.description.data, deadline
        self.operations = count_operations(predictor.network, self.data.image_size)
        if predictor.policy.ensemble:
            self.operations = ensemble_operations(self.operations, predictor.network.num_classes)
        self.exits = torch.zeros(len(self.operations), dtype=torch.int64)
        self.num_late, self.num_calls, self.milliseconds = 0, 0, 0.0

    def predict(self, names: list[Path], images: Tensor) -> list[dict]:
        """Return one row per image (n, 3, H, W), uint8.

        Images for which the network's output is not finite are reported, and have no row.
        """
        try:
            return self._rows(names, images)
        except NotFiniteError as error:
            for position in error.positions:
                _say(f"the network's output for {names[position]} is not finite; skipped")
            others = [i for i in range(len(names)) if i not in error.positions]
        return self.predict([names[i] for i in others], images[others]) if others else []

    def _rows(self, names: list[Path], images: Tensor) -> list[dict]:
        if self.num_calls == 0:
            self.predictor(images[:WARM_UP_IMAGES])
        began = time.perf_counter()
        prediction = Prediction(*(values.cpu() for values in self.predictor(images)))  # waits for the device
        milliseconds = 1e3 * (time.perf_counter() - began)
        self.num_calls += 1
        self.num_late += self.deadline is not None and milliseconds > self.deadline
        self.milliseconds += milliseconds
        self.exits += torch.bincount(prediction.exits, minlength=len(self.exits))
        if self.alarm is not None:
            self._watch(prediction)
        per_image = milliseconds / len(names)
        return [self._row(name, prediction, i, per_image) for i, name in enumerate(names)]

    def _watch(self, prediction: Prediction) -> None:
        has_fired = self.alarm.fired_after is not None
        if self.alarm.update(prediction.log_sum_exp) and not has_fired:
            _say(
                f"drift alarm after {self.alarm.fired_after} images: they are no longer like the held-out "
                "images, so the accuracy and the operations of the policy may not hold for them; or they are "
                "sorted, by class for example"
            )

    def _row(self, name: Path, prediction: Prediction, i: int, milliseconds: float) -> dict[str, Any]:
        best = prediction.probs[i].topk(min(BEST_CLASSES, prediction.probs.shape[1]))
        # Not a dictionary: two classes may have the same name.
        top5 = [
            {"class": self.data.class_names[k], "index": k, "confidence": round(probability, 4)}
            for k, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        k = int(prediction.exits[i])
        return {
            "file": os.fsencode(name).decode("utf-8", "replace"),
            "class": top5[0]["class"],
            "confidence": top5[0]["confidence"],
            "exit": k + 1,
            "operations": self.operations[k],
            "network_milliseconds": round(milliseconds, 3),
            "top5": top5,
        }

    def summary(self) -> dict[str, Any]:
        """Return the totals over all images predicted so far."""
        images = int(self.exits.sum())
        count = max(images, 1)
        spent = sum(n * number for n, number in zip(self.exits.tolist(), self.operations, strict=True))
        return {
            "images": images,
            "operations": round(spent / count),
            "share_of_operations": round(spent / count / self.operations[-1], 4),
            "share_of_exits": [round(n / count, 4) for n in self.exits.tolist()],
            "network_milliseconds": round(self.milliseconds / count, 3),
            "late": self.num_late / max(self.num_calls, 1) if self.deadline is not None else None,
            "drift_alarm": None if self.alarm is None else {"fired_after": self.alarm.fired_after},
        }


def _in_words(summary: dict[str, Any]) -> str:
    count, late, shares = (summary[name] for name in ("images", "late", "share_of_exits"))
    if not count:
        return "no image was predicted"
    return (
        f"{count} image{'s' if count > 1 else ''}: {summary['operations'] / 1e6:.2f} M operations per image "
        f"({100 * summary['share_of_operations']:.0f} % of all), {summary['network_milliseconds']:.3g} ms in "
        f"the network, reading not counted; left at exits 1 to {len(shares)}: "
        f"{' / '.join(f'{100 * share:.0f}' for share in shares)} %"
        + ("" if late is None else f"; {100 * late:.1f} % of the predictions were late")
    )


def _about_network(
    arguments: argparse.Namespace, path: Path, network: ExitNetwork, files: list[Path]
) -> list[str]:
    """Return lines that say what the network knows, and whether the images are of another kind."""
    data, origin = network.description.data, ""
    if arguments.model is None:
        origin = ", as there is no run of yours" if path.parent == WEIGHTS else ", the newest one"
    names = ", ".join(data.class_names[:SHOWN_CLASSES]) + ", ..." * (len(data.class_names) > SHOWN_CLASSES)
    lines = [
        f"network {path}{origin}: it knows {len(data.class_names)} classes ({names}) in images of "
        f"{data.image_size} x {data.image_size} pixels ({data.name})"
    ]
    # Photographs of any size are what a network of larger images, or of one's own, was trained on.
    side = None if data.name == "folder" else _usual_side(files)
    if side is not None and data.image_size <= SMALL_IMAGE_SIZE and side > FAR_SIZES_RATIO * SMALL_IMAGE_SIZE:
        lines.append(
            f"the images have about {side} pixels per side, far more than the network's {data.image_size}: "
            "it was trained on other images, so its predictions may be wrong at any confidence"
        )
    elif side is not None and side * FAR_SIZES_RATIO < data.image_size:
        lines.append(
            f"the images have about {side} pixels per side and are enlarged to the network's "
            f"{data.image_size}: its predictions may be wrong at any confidence"
        )
    return lines


def _usual_side(files: list[Path]) -> int | None:
    """Return the median of the shorter sides of some images, in pixels; None if no image can be read."""
    sides = []
    for path in files[:: max(len(files) // SAMPLED_FILES, 1)]:
        try:
            sides.append(read_image(path, lambda image: min(image.size)))
        except UserError:  # reported when the image is predicted
            continue
    return int(statistics.median(sides)) if sides else None


def _batches(
    files: list[Path], info: DataInfo, batch_size: int
) -> Iterator[tuple[list[Path], Tensor | None]]:
    """Yield names and bytes (n, 3, H, W) of readable images; for an unreadable one its name and None."""
    transform = evaluation_transform(info.image_size, info.crop_share, info.interpolation)
    names, images = [], []
    for path in files:
        try:
            image = read_image(path, transform)
        except UserError as error:
            _say(f"{error}; skipped")
            yield [path], None
            continue
        names.append(path)
        images.append(image)
        if len(names) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if names:
        yield names, torch.stack(images)


def _progress_bar(arguments: argparse.Namespace, total: int) -> tqdm:
    is_shown = is_terminal(sys.stderr) and (arguments.output is not None or not is_terminal(sys.stdout))
    return tqdm(total=total, unit="image", disable=not is_shown)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _say(line: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):
        print_error(f"predict.py: {line}")
