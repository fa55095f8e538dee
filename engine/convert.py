"""Write a checkpoint of this project as the released programs write theirs, so that they can read it.

python -m engine.convert save/cifar100/GE/best.safetensors msdnet_ge.pth.tar
"""

import sys
from pathlib import Path

import torch

from engine.checkpoint import load_saved
from models import released_flags, to_released
from utils import CommandLineParser, UserError, atomic_write


def main(argv: list[str] | None = None) -> int:
    """Convert a file; returns the exit status."""
    parser = CommandLineParser(prog="engine.convert", description="Write a checkpoint under the released programs' names.")
    parser.add_argument("checkpoint", type=Path, help="file of train_GE.py or train_IMTA.py")
    parser.add_argument("output", type=Path, help="file to write")
    options = parser.parse_args(argv)
    try:
        saved = load_saved(options.checkpoint, {})
        flags = released_flags(saved.network)
        state = {
            "epoch": saved.description.epoch if saved.description else 0,
            "arch": flags["arch"],
            "state_dict": to_released(saved.network),
        }
        with atomic_write(options.output, "wb") as stream:
            torch.save(state, stream)
    except (UserError, ValueError) as error:
        sys.stderr.write(f"engine.convert: {error}\n")
        return 2
    sys.stdout.write(f"{options.output}: read it with " + " ".join(f"--{name} {value}" for name, value in flags.items()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
