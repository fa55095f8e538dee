"""Training, prediction and ONNX on a quiet machine and beside one busy core.

    python -m benchmarks.busy_core                 # this code
    python -m benchmarks.busy_core --active        # with OMP_WAIT_POLICY=ACTIVE, for comparison

Prints images per second and the share of the quiet speed that is left; at least 0.4 is wanted.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "imta_cifar100"
IMAGES_PER_SECOND = 100  # of which images are made


def train(folder: Path, _seconds: float) -> float:
    """Return images per second of the demo's first epoch."""
    command = ["train_GE.py", "--epochs", "1", "--compile", "off"]
    command += ["--save", str(folder / "run"), "--overwrite"]
    _run(command)
    return json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[0])["images_per_second"]


def predict(folder: Path, seconds: float, batch_size: int) -> float:
    """Return images per second in the network of ``predict.py``, with the threads that it chooses."""
    images, output = folder / "images", folder / "predictions.json"
    images.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (int(seconds * IMAGES_PER_SECOND) + 1, 32, 32, 3))
    for i, image in enumerate(pixels.astype(np.uint8)):
        Image.fromarray(image).save(images / f"{i}.png")
    flags = ["--batch-size", str(batch_size), "--format", "json", "--output", str(output)]
    _run(["predict.py", str(images), "--model", NETWORK, *flags])
    return 1e3 / json.loads(output.read_text())["summary"]["network_milliseconds"]


def onnx(folder: Path, seconds: float) -> float:
    """Return images per second of the exported file, one image at a time with two threads."""
    _run(["export_onnx.py", "--model", NETWORK, "--output", str(folder / "network.onnx")])
    code = f"""
import time, numpy
from onnx_predictor import OnnxPredictor
predictor = OnnxPredictor(r"{folder / "network.onnx"}", threads=2)
images = numpy.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=numpy.uint8)
predictor.predict(images[:1])
count, began = 0, time.perf_counter()
while time.perf_counter() - began < {seconds}:
    predictor.predict(images[count % 64][None])
    count += 1
print(count / (time.perf_counter() - began))
"""
    return float(_run(["-c", code]))


def _run(arguments: list[str]) -> str:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _beside_a_busy_core(measure: Callable[[Path, float], float], folder: Path, seconds: float) -> float:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(min(seconds, 1))
        return measure(folder, seconds)
    finally:
        busy.kill()
        busy.wait()


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=10,
        help="of ONNX Runtime; predict.py gets 100 images for each (default: %(default)s)",
    )
    parser.add_argument("--active", action="store_true", help="let OpenMP's threads spin")
    arguments = parser.parse_args()
    if arguments.active:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
    sys.stdout.write("| images/s | quiet | beside a busy core | share |\n|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        measures = {
            "training, the demo": train,
            "prediction, one image at a time": functools.partial(predict, batch_size=1),
            "prediction, 64 images at a time": functools.partial(predict, batch_size=64),
            "ONNX Runtime, one image at a time": onnx,
        }
        for name, measure in measures.items():
            quiet = measure(Path(folder), arguments.seconds)
            busy = _beside_a_busy_core(measure, Path(folder), arguments.seconds)
            sys.stdout.write(f"| {name} | {quiet:.1f} | {busy:.1f} | {busy / quiet:.2f} |\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
