"""Write a trained network as ONNX: one file that stops early, or a directory with one file per block.

    python export_onnx.py --model save/demo/IMTA/best.safetensors --output network.onnx
    python export_onnx.py --model save/demo/IMTA/best.safetensors --output network/

Both hold the classes, the preprocessing, and the policies of ``policy.json`` beside the checkpoint.
``onnx_predictor.py`` and ``examples/browser/predictor.mjs`` run both.
"""

import argparse
import os
import sys
from pathlib import Path

# Before PyTorch loads; train_GE.py says why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from adaptive_inference.export import export_blocks, export_onnx
from adaptive_inference.fingerprint import describe
from adaptive_inference.loading import folded_for
from adaptive_inference.policy_files import policy_path, read_policy
from engine.checkpoint import load_saved
from parsing import CommandLineParser, output_file, user_path
from utils import UserError, print_error, print_line


def main(argv: list[str] | None = None) -> int:
    """Export what the arguments name, and return the exit status.

    Args:
        argv: The arguments; None takes those of the process.
    """
    parser = CommandLineParser(
        prog="export_onnx.py", description="Write a trained network as ONNX that stops early."
    )
    parser.add_argument(
        "--model",
        type=user_path,
        required=True,
        metavar="NAME|FILE|DIR",
        help="network of either stage: a file, the directory of a run, or a name in weights/",
    )
    parser.add_argument(
        "--output",
        type=output_path,
        required=True,
        metavar="PATH",
        help="ONNX file to write, or a directory (PATH/) for one file per block without control flow",
    )
    parser.add_argument(
        "--policy",
        type=user_path,
        metavar="FILE",
        help="policies (default: policy.json or NAME.policy.json beside the network, if any)",
    )
    arguments = parser.parse_args(argv)
    output, is_directory = arguments.output
    export = export_blocks if is_directory else export_onnx
    try:
        saved = load_saved(arguments.model)
        policy = arguments.policy or policy_path(saved.path)
        curve = read_policy(policy) if arguments.policy or policy.exists() else None
        if curve is not None:
            folded_for(saved.network, curve, policy)  # checks that they belong together
        print_line(f"converting {describe(saved.network)}, which takes some seconds per exit")
        export(saved.network, output, curve)
    except UserError as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    except KeyboardInterrupt:
        print_error(f"{parser.prog}: interrupted")
        return 130
    policies = f"{len(curve.of_rule(None))} policies" if curve else "no policies"
    if curve is not None and curve.dtype != "float32":
        policies += f" (made in {curve.dtype}; in float32 an image close to a threshold may leave elsewhere)"
    print_line(f"{describe(saved.network)}, {policies}: {output}")
    return 0


def output_path(text: str) -> tuple[Path, bool]:
    """Return the path of ``--output``, and whether it is a directory, for a file per block."""
    path = output_file(text)
    is_directory = text.endswith(("/", os.sep)) or path.is_dir()
    if path.suffix != ".onnx" and path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is a file already, and its name does not end in .onnx")
    if path.suffix != ".onnx" and not is_directory:
        raise argparse.ArgumentTypeError(f"{path}: pass a file ending in .onnx, or a directory as {path}/")
    return path, is_directory


if __name__ == "__main__":
    sys.exit(main())
