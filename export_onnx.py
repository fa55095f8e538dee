"""Write a trained network as one ONNX file that stops early.

    python export_onnx.py --model save/demo/IMTA/best.safetensors --output network.onnx

The file knows its classes, its preprocessing, and the policies of ``policy.json`` beside the checkpoint; ``onnx_predictor.py`` and
``examples/classify.js`` run it.
"""

import atexit
import gc
import sys
from pathlib import Path

from utils import CommandLineParser, UserError


def main(argv: list[str] | None = None) -> int:
    """Export what these arguments name (None: those of the process) and return the exit status."""
    parser = CommandLineParser(
        prog="export_onnx.py", description="Write a trained network as one ONNX file that stops early."
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="FILE",
        help="of either stage: a file, directory of a run, or name in weights/",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="its policies (default: policy.json beside the checkpoint, if any)",
    )
    arguments = parser.parse_args(argv)
    atexit.register(gc.freeze)  # a last search for garbage in all of PyTorch would take seconds

    from adaptive_inference.export import (
        export_onnx,
    )  # here, as PyTorch takes seconds to load, and --help needs none
    from adaptive_inference.fingerprint import describe
    from adaptive_inference.fold import folded_for
    from adaptive_inference.policies import read_policy
    from engine.checkpoint import load_saved
    from models.files import policy_path

    try:
        saved = load_saved(arguments.model, {})
        policy = arguments.policy or policy_path(saved.path)
        curve = read_policy(policy) if arguments.policy or policy.exists() else None
        if curve is not None:
            folded_for(saved.network, curve, policy)
        export_onnx(saved.network, arguments.output, saved.description, curve)
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    count = f"{len(curve.of_rule(None))} policies" if curve else "no policies"
    if curve is not None and curve.dtype != "float32":
        count += f" (found in {curve.dtype}; in float32 an image close to a threshold may leave elsewhere)"
    sys.stdout.write(f"{describe(saved.network)}, {count}: {arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
