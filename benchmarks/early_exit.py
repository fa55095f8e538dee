"""Measure what early exit saves in time, not only in counted operations.

    python -m benchmarks.early_exit                      # random weights, two threads
    python -m benchmarks.early_exit --checkpoint save/cifar100/IMTA/best.safetensors --device cuda

Every ratio compares medians of functions that were called in turn, so that another program on the machine
slows both alike. With random weights, thresholds are quantiles of the confidences on the same images: the
shares of the exits, and so the operations, are as wanted, but the predictions mean nothing.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from adaptive_inference.budgeted import geometric_thresholds
from adaptive_inference.confidence import ALL_LEAVE, NONE_LEAVE, assign_exits, confidence_by_exit
from adaptive_inference.fold import fold
from adaptive_inference.policies import Policy
from adaptive_inference.predictor import AdaptivePredictor
from benchmarks.timing import median_seconds
from engine.checkpoint import load_saved
from engine.report import millions
from engine.runtime.precision import fastest_dtype
from models import IMTA, MSDNet, count_operations
from parsing import CommandLineParser, at_least, user_path
from utils import UserError

SEVEN_EXITS = {
    "num_blocks": 7,
    "base": 4,
    "step": 2,
    "num_channels": 16,
    "growth_rate": 6,
    "num_classes": 100,
}
SHARES_OF_OPERATIONS = (0.3, 0.5, 0.7)

_print = functools.partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the ratios; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.early_exit",
        description="Ratios of adaptive inference, measured in one run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--threads",
        type=at_least(1, 1024),
        default=2,
        metavar="N",
        help="threads of PyTorch and ONNX Runtime (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="device to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint",
        type=user_path,
        metavar="FILE",
        help="network to measure (default: 7 exits, random weights)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=7,
        metavar="N",
        help="rounds of every comparison (default: %(default)s)",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also show where the folded network spends its time"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here")
        with torch.inference_mode():
            Benchmark(arguments).run()
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return 0


class Benchmark:
    """One network on one device."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.network, self.image_size = _network(arguments.checkpoint)
        self.network.to(self.device)
        self.operations = count_operations(self.network, self.image_size)

    def run(self) -> None:
        """Print all ratios."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{self.arguments.threads} CPU threads"
        )
        _print(f"{self.network.kind}, {self.network.num_exits} exits, {self.image_size} pixels, on {name}")
        _print(f"operations to each exit: {millions(*self.operations)}\n")
        folded_networks = {"float32": fold(self.network)}
        half = fastest_dtype(
            self.device, self.network, self.image_size, self.operations[-1], 64, trains=False
        )
        if half is not None:
            folded_networks[str(half)] = fold(self.network, dtype=half)
        for dtype, network in folded_networks.items():
            self.budgeted(f"folded, {dtype}", network)
        self.folded(folded_networks)
        if self.device.type == "cpu":
            self.onnx()

    def budgeted(self, title: str, network: nn.Module) -> None:
        """Time budgeted prediction against running every exit of the same network."""
        _print(f"{title}: time of budgeted prediction / time of running every exit")
        for batch_size in (256, 1):
            images = self.images(max(batch_size, 64))
            confidence, _ = confidence_by_exit(torch.stack(network(images)).float().cpu())
            functions = {"every exit": _each(images.split(batch_size), network)}
            shares = {}
            for wanted in SHARES_OF_OPERATIONS:
                name = f"{wanted:.0%}"
                policy, shares[name] = _policy_spending(wanted, confidence, self.operations)
                functions[name] = _each(images.split(batch_size), AdaptivePredictor(network, policy))
            seconds = median_seconds(functions, self.arguments.repeats)
            full = seconds["every exit"]
            _print(f"  batch {batch_size}: every exit {1e3 * full / len(images):.3f} ms per image")
            for name, share in shares.items():
                _print(f"    {100 * share:.0f} % of the operations: {seconds[name] / full:.3f}")

    def folded(self, folded_networks: dict[str, nn.Module]) -> None:
        """Time the folded networks, by the names of their dtypes, against the plain one."""
        images = self.images(64)
        functions = {
            name: functools.partial(network, images)
            for name, network in {"plain": self.network, **folded_networks}.items()
        }
        seconds = median_seconds(functions, self.arguments.repeats)
        plain = seconds["plain"]
        for dtype in folded_networks:
            _print(
                f"folded, channels-last, {dtype} / plain, batch 64, every exit ({1e3 * plain:.1f} ms): "
                f"{seconds[dtype] / plain:.3f}"
            )
        if self.arguments.profile:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True
            ) as recorded:
                folded_networks["float32"](images)
            _print(
                recorded.key_averages(group_by_input_shape=True).table(
                    "self_cpu_time_total", row_limit=20, max_shapes_column_width=60
                )
            )

    def onnx(self) -> None:
        """Time the ONNX file against PyTorch, for one image and for 64."""
        from adaptive_inference.export import export_onnx

        if self.network.description is None:
            names = [str(c) for c in range(self.network.num_classes)]
            data = SimpleNamespace(
                class_names=names,
                image_size=self.image_size,
                crop_share=1.0,
                interpolation="bilinear",
                mean=[0.5] * 3,
                std=[0.25] * 3,
            )
            self.network.description = SimpleNamespace(data=data, operations=self.operations)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            try:
                from onnx_predictor import OnnxPredictor

                export_onnx(self.network, path)
            except (ImportError, UserError) as error:
                _print(f"ONNX Runtime: not measured, {error}")
                return
            runner = OnnxPredictor(path, self.arguments.threads)
        pixels = (255 * (self.images(64) / 4 + 0.5)).clamp(0, 255).byte()
        functions = {"plain": functools.partial(self.network, self.images(1))}
        for count in (1, 64):
            for name, threshold in (("every exit", NONE_LEAVE), ("exit 1", ALL_LEAVE)):
                functions[f"{name}, batch {count}"] = functools.partial(
                    runner.predict, pixels[:count].numpy(), [threshold] * runner.num_exits
                )
        seconds = median_seconds(functions, self.arguments.repeats)
        plain = seconds["plain"]
        _print(
            f"ONNX Runtime, one image, every exit / plain network ({1e3 * plain:.2f} ms): "
            f"{seconds['every exit, batch 1'] / plain:.3f}"
        )
        for count in (1, 64):
            full, first = (seconds[f"{name}, batch {count}"] for name in ("every exit", "exit 1"))
            _print(
                f"  batch {count}, leaving at exit 1 / every exit ({1e3 * full:.2f} ms): {first / full:.3f}"
            )

    def images(self, count: int) -> Tensor:
        """Return random images (count, 3, S, S)."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, self.image_size, self.image_size, generator=generator)
        # Different contrasts spread the confidences of a random network.
        return (images * torch.linspace(0.2, 3, count)[:, None, None, None]).to(self.device)


def _network(checkpoint: Path | None) -> tuple[nn.Module, int]:
    if checkpoint is not None:
        saved = load_saved(checkpoint)
        return saved.network, saved.data.image_size
    torch.manual_seed(0)
    network = IMTA(MSDNet(**SEVEN_EXITS)).eval()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.5)
    return network, 32


def _policy_spending(wanted: float, confidence: Tensor, operations: list[int]) -> tuple[Policy, float]:
    """Return geometric thresholds that spend about ``wanted`` of all operations, and the share they spend.

    Both shares are of the operations for these images with every exit.
    """
    counts = torch.tensor(operations, dtype=torch.float64) / operations[-1]
    shares = {
        counts[assign_exits(confidence, thresholds)].mean().item(): thresholds.tolist()
        for thresholds in geometric_thresholds(confidence, num_points=400)
    }
    nearest = min(shares, key=lambda share: abs(share - wanted))
    return Policy(tuple(shares[nearest])), nearest


def _each(batches: tuple[Tensor, ...], function: Callable[[Tensor], object]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            function(batch)

    return run


if __name__ == "__main__":
    sys.exit(main())
