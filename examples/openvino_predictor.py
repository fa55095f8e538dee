"""Run the blocks of a network on OpenVINO, and compare its time with ONNX Runtime's (pip install openvino).

    python export_onnx.py --model imta_cifar100 --output network/
    python -m examples.openvino_predictor network/

OpenVINO cannot stop early inside one file, but a file per block needs no control flow.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino

from onnx_predictor import BLOCK_FIELDS, OnnxPredictor
from parsing import at_least, user_path
from utils import one_line

LEAST_SECONDS = 0.2  # of one measurement


class OpenVinoPredictor(OnnxPredictor):
    """A network with one file per block, on OpenVINO.

    Args:
        path: The directory.
        threads: Threads per operator; None leaves the number to OpenVINO.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the path is one file, or a file is damaged or of another version.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        if Path(os.path.expanduser(path)).is_file():  # noqa: PTH111, as in ``OnnxPredictor``
            raise ValueError(f"{path} is one file with control flow; OpenVINO needs a directory of blocks")
        super().__init__(path, threads)

    def load_block(self, path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """Load the file of a block; see ``OnnxPredictor.load_block``."""
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        # In 16 bits, which OpenVINO uses where the processor has them, images near a threshold would leave
        # elsewhere.
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if self.threads:
            options["INFERENCE_NUM_THREADS"] = self.threads
        core = openvino.Core()
        try:
            source = core.read_model(str(path))
            model = core.compile_model(source, "CPU", options)
        except RuntimeError as error:
            raise ValueError(f"cannot load the model {path}: {one_line(str(error))[:200]}") from None
        # OpenVINO puts the metadata of ONNX files there.
        keys = {name: ["framework", name] for name in BLOCK_FIELDS}
        metadata = {
            name: source.get_rt_info(key).astype(str) for name, key in keys.items() if source.has_rt_info(key)
        }
        self.check_block(path, metadata)
        inputs = [value.any_name for value in model.inputs]
        outputs = [value.any_name for value in model.outputs]

        def run(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            # Not the model's own request, whose outputs another thread would replace.
            found = model.create_infer_request().infer({name: state[name] for name in inputs})
            return {name: found[name] for name in outputs}

        return run


def main(argv: list[str] | None = None) -> int:
    """Print the time per image on both runtimes, and how many predictions differ."""
    parser = argparse.ArgumentParser(
        prog="examples.openvino_predictor", description="Time of a network on OpenVINO beside ONNX Runtime."
    )
    parser.add_argument("network", type=user_path, help="directory of export_onnx.py, with a file per block")
    parser.add_argument(
        "--threads", type=at_least(1), default=2, metavar="N", help="threads per operator (default: 2)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, metavar="N", help="rounds of every measurement (default: 7)"
    )
    arguments = parser.parse_args(argv)
    try:
        runners = [kind(arguments.network, arguments.threads) for kind in (OnnxPredictor, OpenVinoPredictor)]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    size, exits = runners[0].image_size, runners[0].num_exits
    images = np.random.default_rng(0).integers(0, 256, (64, 3, size, size), dtype=np.uint8)
    ways = {"leaving at exit 1": [-1.0] * exits, "every exit": [2.0] * exits}
    if runners[0].points:
        ways["the default policy"] = runners[0].choose()
    for count in (1, 64):
        for name, thresholds in ways.items():
            onnx, vino = _milliseconds(runners, images[:count], thresholds, arguments.rounds)
            print(f"batch {count}, {name}: ONNX Runtime {onnx:.3f} ms per image, OpenVINO {vino:.3f} ms")
    first, second = (runner.predict(images, ways["every exit"]) for runner in runners)
    print(f"predictions that differ: {int((first.classes != second.classes).sum())} of {len(images)}")
    return 0


def _milliseconds(
    runners: Sequence[OnnxPredictor],
    images: np.ndarray,
    thresholds: Sequence[float] | np.ndarray,
    rounds: int,
) -> list[float]:
    """Return the median time per image of each runner, over rounds that call all of them in turn."""
    counts = []
    for runner in runners:
        runner.predict(images, thresholds)  # warm
        began = time.perf_counter()
        runner.predict(images, thresholds)
        counts.append(max(1, round(LEAST_SECONDS / (time.perf_counter() - began))))
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(rounds):
        for runner, count, own in zip(runners, counts, times, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                runner.predict(images, thresholds)
            own.append(1e3 * (time.perf_counter() - began) / count / len(images))
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    sys.exit(main())
