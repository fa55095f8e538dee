"""The work of predict.py: load a network, choose a policy, read images, predict, and write rows as they come.

Example:
    arguments = predict.parse(["folder/", "--budget", "2ms"])
    with handle_signals() as requests:
        status = predict_all(arguments, Path("save/demo/IMTA/best.safetensors"), requests)
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from adaptive_inference.calibration import ensemble_operations
from adaptive_inference.policy_files import policy_path
from adaptive_inference.predictor import AdaptivePredictor, NotFiniteError, Prediction
from adaptive_inference.promises.deadlines import AnytimePredictor, BudgetPredictor
from adaptive_inference.promises.drift import DriftAlarm, read_reference, reference_path
from engine.checkpoint import load_saved
from engine.prediction.predictor_choice import ChosenPredictor, choose_predictor
from engine.prediction.rows import WRITERS, open_output, prediction_rows, text_of_path
from engine.runtime.device import is_out_of_memory, limit_threads, set_tf32
from engine.runtime.signals import Interrupted, SignalRequests
from image_data.defaults import SMALL_IMAGE_SIZE, num_workers
from image_data.folders import LEFT_OUT, find_images
from image_data.reading import ignore_pillow_warnings, median_side, read_image
from image_data.threads import BATCHES_AHEAD, map_batches
from image_data.transforms import evaluation_transform
from models import ExitNetwork
from models.description import DataInfo
from models.errors import first_line
from models.files import WEIGHTS
from utils import UserError, is_terminal, print_error

BATCH_SIZE = 64
WARM_UP_IMAGES = 8
SHOWN_CLASSES = 3
MAX_SIZE_RATIO = 3


class NothingPredicted(Exception):
    """None of the files can be read."""


def predict_all(arguments: argparse.Namespace, path: Path, requests: SignalRequests) -> int:
    """Predict the classes of the images that the command line of predict.py names.

    Args:
        arguments: Parsed command line of predict.py.
        path: The network's file.
        requests: From ``handle_signals``.

    Returns:
        The exit status.

    Raises:
        UserError: The network, its policies or the output cannot be used, flags are in conflict, or memory is
            too small. What was predicted before is in the output.
        Interrupted: A signal stopped the program; likewise.
    """
    ignore_pillow_warnings()
    with _memory_error_named():
        device, network = _device(arguments.device), load_saved(path).network
        # As in training and in evaluations, unless these were told otherwise.
        set_tf32(network.description.recipe.get("tf32", True))
        batch_size = arguments.batch_size or (BATCH_SIZE if arguments.deadline is None else 1)
        limit_threads(arguments.threads, batch_size * network.description.operations[-1])
        policy_file = arguments.policy or policy_path(path)
        choice = choose_predictor(arguments, policy_file, network.to(device), batch_size)
        alarm = _drift_alarm(choice, policy_file) if arguments.drift_alarm else None
        try:
            return _predict_files(arguments, path, choice, batch_size, alarm, requests)
        except NothingPredicted:
            _say(f"nothing is written to {arguments.output}, as no image can be read")
            return 1


def _predict_files(
    arguments: argparse.Namespace,
    path: Path,
    choice: ChosenPredictor,
    batch_size: int,
    alarm: DriftAlarm | None,
    requests: SignalRequests,
) -> int:
    """Predict all files; for the arguments see ``predict_all``.

    Raises:
        NothingPredicted: None of the files can be read; --output is left as it was.
    """
    predictor = choice.predictor
    network = predictor.network
    data, device = network.description.data, next(network.parameters()).device
    timed, operations = TimedPredictor(predictor), _operations_with_ensemble(predictor)
    totals = Totals(operations, arguments.deadline)
    files, complaints = find_images(arguments.paths)
    if arguments.output is not None:
        policy_file = arguments.policy or policy_path(path)
        _check_output(arguments.output, [path, policy_file, reference_path(policy_file), *files])
    skipped = sum(not complaint.startswith(LEFT_OUT) for complaint in complaints)
    # Reading during the prediction would take cores from it, and change the times that are reported, and on
    # which some predictors decide.
    decides_by_time = isinstance(predictor, (AnytimePredictor, BudgetPredictor))
    batches_ahead = 0 if device.type == "cpu" or decides_by_time else BATCHES_AHEAD
    threads = num_workers(arguments.threads)
    stopped_by = None
    with ExitStack() as outputs:
        stream = outputs.enter_context(open_output(arguments.output))
        bar = outputs.enter_context(_progress_bar(arguments, len(files)))
        metadata = {"model": text_of_path(path), "policy": choice.metadata}
        for line in (*_about_network(arguments, path, network, files), choice.summary, *complaints):
            _say(line)
        writer = WRITERS[arguments.format](stream, data.class_names, metadata)
        try:
            with closing(_batches(files, data, batch_size, threads, batches_ahead)) as batches:
                for batch_files, images in batches:
                    result = None if images is None else timed.predict(batch_files, images.to(device))
                    if result is not None:
                        rows = prediction_rows(*result, operations, data.class_names)
                        with requests.held():  # or the summary would count rows that are missing
                            totals.add(result.prediction, result.milliseconds)
                            writer.rows(rows)
                        _watch(alarm, result.prediction)
                    skipped += len(batch_files) - (0 if result is None else len(result.files))
                    bar.update(len(batch_files))
        except (Interrupted, MemoryError, RuntimeError) as error:
            stopped_by = error
        if totals.num_calls == 0 and (stopped_by is not None or arguments.output is not None):
            # An older file of predictions is worth more than an empty one.
            raise stopped_by or NothingPredicted
        fired = None if alarm is None else {"fired_after": alarm.fired_after}
        summary = {**totals.summary(), "drift_alarm": fired}
        with requests.held():
            writer.end(summary)
            outputs.close()
            _say(_in_words(summary))
            if stopped_by is not None:
                _say(f"the {summary['images']} predictions so far are kept")
    if stopped_by is not None:
        raise stopped_by
    if skipped:
        return 1
    return 3 if alarm is not None and alarm.fired_after else 0


def _check_output(output: Path, files: list[Path]) -> None:
    """Raise UserError if the output is one of the files that are read, which it would replace."""
    try:
        replaced = output.stat()
    except OSError:  # there is nothing to replace, or writing will fail and say why
        return
    for file in files:
        with suppress(OSError):  # reading will fail and say why
            if os.path.samestat(file.stat(), replaced):
                raise UserError(f"--output {output} would replace {file}, which is read")


@contextmanager
def _memory_error_named() -> Iterator[None]:
    """Turn an error about memory in the block into a ``UserError``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory for a batch of this size; a smaller --batch-size needs less"
        ) from None


def _operations_with_ensemble(predictor: AdaptivePredictor) -> list[int]:
    """Return the operations to each exit, including the predictor's ensemble."""
    network = predictor.network
    operations = network.description.operations
    return ensemble_operations(operations, network.num_classes) if predictor.policy.ensemble else operations


def _drift_alarm(choice: ChosenPredictor, policy_file: Path) -> DriftAlarm:
    reference = read_reference(reference_path(policy_file), choice.curve)
    return DriftAlarm(reference.scores(choice.predictor.policy))


def _watch(alarm: DriftAlarm | None, prediction: Prediction) -> None:
    """Let the alarm, if there is one, see predictions, and say once that it fired."""
    if alarm is None:
        return
    has_fired = alarm.fired_after is not None
    if alarm.update(prediction.log_sum_exp) and not has_fired:
        _say(
            f"drift alarm after {alarm.fired_after} images: they are no longer like the held-out images, so "
            "the accuracy and the operations of the policy may not hold for them; or they are sorted, by "
            "class for example"
        )


class TimedPrediction(NamedTuple):
    """The prediction of n images, on the CPU, with their files and the time of all of them together."""

    files: list[Path]
    prediction: Prediction
    milliseconds: float


class TimedPredictor:
    """A predictor that measures its time, and leaves out images without finite output."""

    def __init__(self, predictor: AdaptivePredictor):
        self.predictor, self.is_warm = predictor, False

    def predict(self, files: list[Path], images: Tensor) -> TimedPrediction | None:
        """Predict images (n, 3, H, W), uint8. Those without finite output are reported.

        Returns:
            The prediction of the others, None if there are none.
        """
        while files:
            try:
                return self._predict(files, images)
            except NotFiniteError as error:
                for position in error.positions:
                    _say(f"the network's output for {files[position]} is not finite; skipped")
                others = [i for i in range(len(files)) if i not in error.positions]
            files, images = [files[i] for i in others], images[others]
        return None

    def _predict(self, files: list[Path], images: Tensor) -> TimedPrediction:
        if not self.is_warm:  # without the predictor's own clock, whose next choice would follow this time
            AdaptivePredictor(self.predictor.network, self.predictor.policy)(images[:WARM_UP_IMAGES])
        began = time.perf_counter()
        prediction = Prediction(*(values.cpu() for values in self.predictor(images)))  # waits for the device
        milliseconds = 1e3 * (time.perf_counter() - began)
        self.is_warm = True
        return TimedPrediction(files, prediction, milliseconds)


class Totals:
    """Totals over all images predicted so far.

    Args:
        operations: Operations to each exit.
        deadline: Deadline of each batch in milliseconds, None without one.
    """

    def __init__(self, operations: list[int], deadline: float | None):
        self.operations, self.deadline = operations, deadline
        self.exits = torch.zeros(len(operations), dtype=torch.int64)
        self.num_late, self.num_calls, self.milliseconds = 0, 0, 0.0

    def add(self, prediction: Prediction, milliseconds: float) -> None:
        """Add a batch and the time it took."""
        self.num_calls += 1
        if self.deadline is not None and milliseconds > self.deadline:
            self.num_late += len(prediction.exits)
        self.milliseconds += milliseconds
        self.exits += torch.bincount(prediction.exits, minlength=len(self.exits))

    def summary(self) -> dict[str, Any]:
        """Return the totals by name, in plain types."""
        images = int(self.exits.sum())
        count = max(images, 1)
        spent = sum(n * number for n, number in zip(self.exits.tolist(), self.operations, strict=True))
        return {
            "images": images,
            "operations": round(spent / count),
            "share_of_operations": round(spent / count / self.operations[-1], 4),
            "share_of_exits": [round(n / count, 4) for n in self.exits.tolist()],
            "network_milliseconds": round(self.milliseconds / count, 3),
            "late": self.num_late / count if self.deadline is not None else None,
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
        + ("" if late is None else f"; {100 * late:.1f} % of the images were late")
    )


def _about_network(
    arguments: argparse.Namespace, path: Path, network: ExitNetwork, files: list[Path]
) -> list[str]:
    """Return lines that say what the network knows, and whether the images are of another kind."""
    data, origin = network.description.data, ""
    if arguments.model is None:
        origin = ", as there is no run of yours" if path.parent == WEIGHTS else ", the newest one"
    more = ", ..." if len(data.class_names) > SHOWN_CLASSES else ""
    names = ", ".join(data.class_names[:SHOWN_CLASSES]) + more
    lines = [
        f"network {path}{origin}: it knows {len(data.class_names)} classes ({names}) in images of "
        f"{data.image_size} x {data.image_size} pixels ({data.name})"
    ]
    # Photographs of any size are what a network of larger images, or of one's own, was trained on.
    side = None if data.name == "folder" else median_side(files)
    if side is not None and data.image_size <= SMALL_IMAGE_SIZE and side > MAX_SIZE_RATIO * SMALL_IMAGE_SIZE:
        lines.append(
            f"the images have about {side} pixels per side, far more than the network's {data.image_size}: "
            "it was trained on other images, so its predictions may be wrong at any confidence"
        )
    elif side is not None and side * MAX_SIZE_RATIO < data.image_size:
        lines.append(
            f"the images have about {side} pixels per side and are enlarged to the network's "
            f"{data.image_size}: its predictions may be wrong at any confidence"
        )
    return lines


def _batches(
    files: list[Path], info: DataInfo, batch_size: int, threads: int, batches_ahead: int
) -> Iterator[tuple[list[Path], Tensor | None]]:
    """Yield names and bytes (n, 3, H, W) of readable images; for an unreadable one its name and None.

    Args:
        files: The image files.
        info: What the network knows about its images.
        batch_size: Files per batch; unreadable ones leave fewer images.
        threads: Threads that read, as for ``map_batches``.
        batches_ahead: Batches that are read during a prediction.
    """
    transform = evaluation_transform(info.image_size, info.crop_share, info.interpolation)

    def read(path: Path) -> tuple[Path, Tensor | UserError]:
        try:
            return path, read_image(path, transform)
        except UserError as error:
            return path, error

    chunks = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
    for results in map_batches(read, chunks, threads, batches_ahead):
        names, images = [], []
        for path, image in results:
            if isinstance(image, UserError):
                _say(f"{image}; skipped")
                yield [path], None
            else:
                names.append(path)
                images.append(image)
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
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from None
    return device


def _say(line: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):
        print_error(f"predict.py: {line}")
