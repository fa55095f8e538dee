"""Measure the time to each exit of a cut network, against the same blocks inside the uncut network.

    python -m benchmarks.time_to_exit          # resnet18 and mobilenet_v3_small, 224 pixels
    python -m benchmarks.time_to_exit --archs timm/convnext_atto --batch-sizes 1

Both networks are folded. Ours runs the blocks and all exits up to exit k; the uncut network stops after the
same block. Times are shares of the whole uncut network's.
"""

import copy
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaptive_inference import fold
from benchmarks.timing import median_seconds
from models import ExitNetwork, Stepwise, build_backbone
from parsing import CommandLineParser, at_least
from utils import UserError, print_error


class _Stop(Exception):
    pass


def stopping(network: nn.Module, path: str) -> nn.Module:
    """Return a copy of ``network`` whose forward pass ends with ``_Stop`` after the module at ``path``."""

    def stop(*_: object) -> None:
        raise _Stop

    network = copy.deepcopy(network)
    network.get_submodule(path).register_forward_hook(stop)
    return network


@torch.no_grad()
def _run_until_stop(network: nn.Module, images: Tensor) -> None:
    try:
        network(images)
    except _Stop:
        return


@torch.no_grad()
def _run_to_exit(network: ExitNetwork, images: Tensor, k: int) -> None:
    run = Stepwise(network, images)
    for _ in range(k + 1):
        run.next_logits()


def compare(arch: str, image_size: int, batch_size: int, rounds: int) -> list[tuple[float, float]]:
    """Return the times to each exit, cut and uncut, as shares of the whole uncut network's."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, 4, image_size=image_size).eval()
    network = fold(backbone)
    uncut = network.network.network
    images = torch.randn(batch_size, 3, image_size, image_size).to(memory_format=torch.channels_last)
    functions: dict[str, Callable[[], object]] = {"all": functools.partial(_run_until_stop, uncut, images)}
    for k in range(network.num_exits):
        functions[f"cut {k}"] = functools.partial(_run_to_exit, network, images, k)
        if k < network.num_exits - 1:
            stopped = stopping(uncut, backbone.config["exits"][k])
            functions[f"uncut {k}"] = functools.partial(_run_until_stop, stopped, images)
    seconds = median_seconds(functions, rounds)
    whole = seconds["all"]
    return [
        (seconds[f"cut {k}"] / whole, seconds.get(f"uncut {k}", whole) / whole)
        for k in range(network.num_exits)
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the shares; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.time_to_exit", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--archs", nargs="+", default=["resnet18", "mobilenet_v3_small"], metavar="NAME")
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[1, 64], metavar="N")
    parser.add_argument("--image-size", type=at_least(1), default=224, metavar="PIXELS")
    parser.add_argument("--threads", type=at_least(1, 1024), default=2, metavar="N")
    parser.add_argument("--rounds", type=at_least(1), default=7, metavar="N")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        for arch in arguments.archs:
            for batch_size in arguments.batch_sizes:
                print(
                    f"{arch}, {arguments.image_size} pixels, batch {batch_size}, {arguments.threads} threads"
                )
                print_shares(compare(arch, arguments.image_size, batch_size, arguments.rounds))
    except (UserError, ValueError) as error:
        print_error(f"{parser.prog}: {error}")
        return 2
    return 0


def print_shares(shares: list[tuple[float, float]]) -> None:
    """Print the times of ``compare``, one line per exit."""
    for k, (cut, uncut) in enumerate(shares):
        more = f"more {cut - uncut:+.3f}"
        print(f"  to exit {k + 1}: {cut:.3f}, the same blocks uncut {uncut:.3f}, {more}")


if __name__ == "__main__":
    sys.exit(main())
