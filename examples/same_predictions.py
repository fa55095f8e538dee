"""Compare the predictions of a network in PyTorch, in both kinds of ONNX export, in Node.js and on OpenVINO.

    python -m examples.same_predictions photo.jpg more/*.png
    python -m examples.same_predictions cifar100/test --model imta_cifar100 --openvino-images 1000

Node.js takes part where it finds onnxruntime-node (``npm install`` in examples/browser), OpenVINO where it is
installed. Runtimes round differently in the last digits, so an image whose confidence is within 1e-5 of the
threshold of an exit may leave there in one runtime and go on in another. Those are counted; the exit status
is 0 if no other prediction differs, 1 if one does, 2 after a mistake. results/promises.md has the
figures for the 10,000 test images of CIFAR-100, of which no prediction differs.
"""

import os

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adaptive_inference import AdaptivePredictor, confidence_by_exit, fold, read_policy
from adaptive_inference.export import convert_blocks, export_blocks, export_onnx
from adaptive_inference.policies import Policy
from adaptive_inference.policy_files import policy_path
from engine.checkpoint import load_saved
from image_data.reading import read_image
from image_data.transforms import evaluation_transform
from models.files import find
from onnx_predictor import OnnxPredictor
from parsing import at_least, user_path
from utils import UserError

BROWSER = Path(__file__).resolve().parent / "browser"
NEAR = 1e-5  # of a threshold
TOLERANCE = 1e-5  # of confidences
PRINTED_TOLERANCE = 6e-5  # of those that Node.js prints with four digits
BATCH_SIZE = 256
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".webp")


class Rows(NamedTuple):
    """Predictions for N images: class, confidence and exit (from 0), (N,) each."""

    classes: np.ndarray
    confidence: np.ndarray
    exits: np.ndarray


def main(argv: list[str] | None = None) -> int:
    """Compare the predictions for these images in every way, and return the exit status."""
    parser = argparse.ArgumentParser(prog="examples.same_predictions", description=__doc__.splitlines()[0])
    parser.add_argument(
        "images", nargs="+", type=user_path, help="image files, or directories that hold them"
    )
    parser.add_argument("--model", default="imta_cifar100", help="network (default: %(default)s)")
    parser.add_argument(
        "--openvino-images",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="images for OpenVINO (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        return compare(_files(arguments.images), arguments.model, arguments.openvino_images)
    except (UserError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2


def compare(files: list[Path], model: str, openvino_images: int) -> int:
    """Print how many predictions each way has that differ from PyTorch's.

    Returns:
        The exit status: 1 if one differs although its confidence is near no threshold, else 0.
    """
    network = load_saved(find(model)).network
    curve = read_policy(policy_path(find(model)))
    policy = curve.default_point().policy
    data = network.description.data
    transform = evaluation_transform(data.image_size, data.crop_share, data.interpolation)
    pixels = torch.stack([read_image(file, transform) for file in files])  # (N, 3, S, S) uint8
    network = fold(network, dtype=torch.float32)
    expected = by_pytorch(network, policy, pixels)
    near = _near_thresholds(network, policy, pixels)
    reached = np.arange(len(near))[:, None] <= expected.exits
    count = int((near & reached).any(axis=0).sum())
    print(f"{len(pixels)} images; {count} have a confidence within {NEAR:g} of a threshold")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        file, directory = Path(folder, "network.onnx"), Path(folder, "network")
        blocks = convert_blocks(network)
        export_onnx(network, file, curve, blocks)
        export_blocks(network, directory, curve, blocks)
        ways = {
            "ONNX, one file": lambda: by_onnx(OnnxPredictor(file), policy, pixels),
            "ONNX, a file per block": lambda: by_onnx(OnnxPredictor(directory), policy, pixels),
        }
        if has_node():
            ways["Node.js, one file"] = lambda: by_node(
                file, policy, pixels, network.description.data.class_names
            )
            ways["Node.js, a file per block"] = lambda: by_node(
                directory, policy, pixels, network.description.data.class_names
            )
        else:
            print("Node.js: not tried, as it finds no onnxruntime-node")
        if importlib.util.find_spec("openvino"):
            from examples.openvino_predictor import OpenVinoPredictor

            ways["OpenVINO"] = lambda: by_onnx(OpenVinoPredictor(directory), policy, pixels[:openvino_images])
        else:
            print("OpenVINO: not tried, as it is not installed")
        for name, predict in ways.items():
            tolerance = PRINTED_TOLERANCE if name.startswith("Node.js") else TOLERANCE
            failed += report(name, predict(), expected, near, tolerance)
    return int(failed > 0)


def by_pytorch(network: torch.nn.Module, policy: Policy, pixels: Tensor) -> Rows:
    """Predict images (N, 3, S, S) uint8 with PyTorch."""
    predictor = AdaptivePredictor(network, policy)
    parts = [predictor(batch) for batch in pixels.split(BATCH_SIZE)]
    return Rows(*(torch.cat(x).numpy() for x in list(zip(*parts, strict=True))[:3]))


def by_onnx(runner: OnnxPredictor, policy: Policy, pixels: Tensor) -> Rows:
    """Predict images (N, 3, S, S) uint8 with ONNX Runtime, or a runtime with the same interface."""
    parts = [runner.predict(batch.numpy(), policy.thresholds) for batch in pixels.split(BATCH_SIZE)]
    return Rows(*(np.concatenate(x) for x in list(zip(*parts, strict=True))[:3]))


def by_node(model: Path, policy: Policy, pixels: Tensor, class_names: list[str]) -> Rows:
    """Predict images (N, 3, S, S) uint8 with ``examples/browser/classify.mjs``."""
    images = io.BytesIO()
    for image in pixels:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images, format="ppm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.ppm")
        file.write_bytes(images.getvalue())
        # 17 digits lose nothing of a number.
        thresholds = ",".join(f"{threshold:.17g}" for threshold in policy.thresholds)
        command = ["node", str(BROWSER / "classify.mjs"), str(model), thresholds, str(file)]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise UserError(f"classify.mjs failed: {result.stderr}")
    found = re.findall(r": (.*), ([\d.]+), exit (\d+)\n", result.stdout)
    classes, confidence, exits = zip(*found, strict=True)
    return Rows(
        np.array([class_names.index(name) for name in classes]),
        np.array(confidence, dtype=float),
        np.array(exits, dtype=int) - 1,
    )


def has_node() -> bool:
    """Return True if Node.js and onnxruntime-node are installed."""
    command = ["node", "-e", "require('onnxruntime-node')"]
    return (
        bool(shutil.which("node"))
        and subprocess.run(command, cwd=BROWSER, capture_output=True).returncode == 0
    )


def report(name: str, found: Rows, expected: Rows, near: np.ndarray, tolerance: float) -> bool:
    """Print how many predictions differ.

    Args:
        name: Name of the way to predict.
        found: Predictions of that way, for the first images or all.
        expected: PyTorch's predictions.
        near: True if the confidence of an image at an exit is near the exit's threshold, bool (K, N).
        tolerance: Largest difference of confidences that counts as equal.

    Returns:
        True if a prediction differs that should not.
    """
    count = len(found.classes)
    expected = Rows(*(x[:count] for x in expected))
    other_exit = found.exits != expected.exits
    differs = other_exit | (found.classes != expected.classes)
    gap = np.abs(found.confidence - expected.confidence)[~differs].max(initial=0.0)
    # Two runtimes part at the first exit at which an image leaves in one of them.
    explained = other_exit & near[np.minimum(found.exits, expected.exits), np.arange(count)]
    print(
        f"{name}: {int(differs.sum())} of {count} predictions differ, {int(explained.sum())} of them near "
        f"a threshold; confidences differ by at most {gap:.1e}"
    )
    return bool((differs & ~explained).any() or gap > tolerance)


@torch.inference_mode()
def _near_thresholds(network: torch.nn.Module, policy: Policy, pixels: Tensor) -> np.ndarray:
    """Return (K, N) bool: whether the confidence at each exit is within ``NEAR`` of its threshold."""
    data = network.description.data
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (data.mean, data.std))
    thresholds = torch.tensor(policy.thresholds)[:, None]
    near = []
    for batch in pixels.split(BATCH_SIZE):
        confidence, _ = confidence_by_exit(torch.stack(network((batch / 255 - mean) / std)))
        near.append((confidence - thresholds).abs() <= NEAR)
    is_near = torch.cat(near, dim=1)
    is_near[-1] = False  # all images that are left leave at the last exit
    return is_near.numpy()


def _files(paths: list[Path]) -> list[Path]:
    """Return the image files that these paths name or hold."""
    files = []
    for path in paths:
        inside = (
            sorted(x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        files += inside
    if not files:
        raise UserError(f"there are no images in {', '.join(map(str, paths))}")
    return files


if __name__ == "__main__":
    sys.exit(main())
