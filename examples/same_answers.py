"""One network run in four ways, and the same answers: torch.hub, predict.py, its ONNX file in Python and in JavaScript.

    python -m examples.same_answers photo.jpg more/*.png

JavaScript takes part where node finds onnxruntime-node (``npm install onnxruntime-node``, or NODE_PATH).
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import export_onnx
import predict
from adaptive_inference import AdaptivePredictor, read_policy
from image_data.reading import read_image
from image_data.transforms import evaluation_transform
from models.files import find, policy_path
from onnx_predictor import OnnxPredictor

ROOT, MODEL = Path(__file__).resolve().parents[1], "imta_cifar100"
TOLERANCE = 2e-4  # of confidences, which are printed with four digits

Answers = list[tuple[int, float, int]]  # class, confidence, exit from 1


def main(argv: list[str] | None = None) -> int:
    """Answer these image files in every way; the exit status is 0 if all agree, 1 if not, 2 after a mistake."""
    network = torch.hub.load(str(ROOT), MODEL, source="local")
    names, transform = (
        network.description.data.class_names,
        evaluation_transform(network.description.data.image_size),
    )
    with tempfile.TemporaryDirectory() as folder:
        answers, onnx = Path(folder) / "answers.json", Path(folder) / "network.onnx"
        flags = ["--model", MODEL, "--device", "cpu", "--format", "json", "--output", str(answers)]
        if predict.main([*(sys.argv[1:] if argv is None else argv), *flags]) or export_onnx.main(
            ["--model", MODEL, "--output", str(onnx)]
        ):
            return 2
        found = json.loads(answers.read_text(encoding="utf-8"))
        rows, runner = found["answers"], OnnxPredictor(onnx)
        pixels = torch.stack([read_image(row["file"], transform) for row in rows])
        ways = {
            "predict.py": [(names.index(row["class"]), row["confidence"], row["exit"]) for row in rows],
            "torch.hub": by_hub(network, pixels, found["policy"]),
            "ONNX in Python": _rows(runner.predict(pixels.numpy())),
        }
        if has_javascript():
            ways["ONNX in JavaScript"] = by_javascript(onnx, runner.choose().tolist(), pixels)
        else:
            print("ONNX in JavaScript: not tried, as node finds no onnxruntime-node")
    others = 0
    for row, *answered in zip(rows, *ways.values(), strict=True):
        same = all(
            (c, k) == answered[0][::2] and abs(p - row["confidence"]) <= TOLERANCE for c, p, k in answered
        )
        others += not same
        print(
            f"{row['file']}: {row['class']}, {row['confidence']:.4f}, exit {row['exit']}"
            + ("" if same else f"; in other ways {answered}")
        )
    print(
        f"{', '.join(ways)}: {f'{others} different' if others else 'identical'} answers to {len(pixels)} images"
    )
    return int(others > 0)


def by_hub(network: torch.nn.Module, pixels: Tensor, chosen: dict) -> Answers:
    """Of the plain network to bytes (N, 3, H, W), by the policy that predict.py chose."""
    points = read_policy(policy_path(find(MODEL))).of_rule(chosen["rule"])
    policy = next(point.policy for point in points if point.p == chosen["p"])
    return _rows(AdaptivePredictor(network, policy)(pixels))


def has_javascript() -> bool:
    """Whether ``classify.js`` would find what it needs."""
    command = ["node", "-e", "require('onnxruntime-node')"]
    return (
        bool(shutil.which("node"))
        and not subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
    )


def by_javascript(onnx: Path, thresholds: list[float], pixels: Tensor) -> Answers:
    """Of ``classify.js`` to bytes (N, 3, H, W)."""
    files = [onnx.with_name(f"{n}.ppm") for n in range(len(pixels))]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    command = [
        "node",
        str(ROOT / "examples" / "classify.js"),
        str(onnx),
        ",".join(map(str, thresholds)),
        *map(str, files),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        (int(c), float(p), int(k))
        for c, p, k in re.findall(r": class (\d+), ([\d.]+), exit (\d+)\n", printed)
    ]


def _rows(prediction: tuple) -> Answers:
    classes, confidence, exits = (values.tolist() for values in prediction[:3])
    return list(zip(classes, confidence, [k + 1 for k in exits], strict=True))


if __name__ == "__main__":
    sys.exit(main())
