"""Compare speed, memory and start-up of training with a plain loop, measured in one run.

    python -m benchmarks.training_speed                            # everything, on all cores of this machine
    python -m benchmarks.training_speed --network imagenet --what speed --images 256 --batch-size 32 --steps 2
    python -m benchmarks.training_speed --device cuda --steps 50
    python -m benchmarks.training_speed --what speed --profile -- --compile off    # flags of train_GE.py

The plain loop (``benchmarks.plain_loop``) is what programs of this field usually do: one process with one
thread per core. Ours is the trainer of this project with its defaults: on a CPU, one process per core. Both
train the same network on the same random images. They run in separate processes and take turns, one round of
steps each. They are compared within the rounds, so that another program on the machine slows both alike;
medians over the rounds are printed. Workers of the plain loop load up to four batches while it waits for its
turn, which favours it. Its threads wait as OpenMP's do by default, and ours as those of ``train_GE.py``.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, cifar

import train_GE
import train_IMTA
from benchmarks.plain_loop import PlainLoop, plain_dataset
from dataloader import load_data
from engine.auto import resolve_auto
from engine.runtime.device import prepare_network_and_device, seed_everything, set_tf32
from engine.runtime.distributed import Processes
from engine.runtime.launch import exit_worker, training_processes
from engine.stepper import Stepper
from engine.trainer import Meters
from models import IMTA, count_operations
from parsing import CommandLineParser, at_least
from settings.command_line import parse
from utils import UserError, available_cores

PARTS = ("speed", "busy", "memory", "startup")
SIDES = ("plain loop", "ours")
WORKERS = 2  # that load images for the plain loop
LEARNING_RATE = 0.01  # the labels are random: training would diverge at the published learning rate
FIRST_STEP = re.compile(r"epoch 1/\d+ 1/")
SCHEDULE_IMAGES, SCHEDULE_EPOCHS = 45_000, {1: 300, 2: 180}  # the published CIFAR-100 settings

# New processes: forks of this one would inherit its threads and memory, and how its threads wait.
SPAWN = multiprocessing.get_context("spawn")

_print = functools.partial(print, flush=True)

PROGRAM = """\
import sys
import train_GE
from benchmarks.training_speed import accept_random_archive
accept_random_archive()
sys.exit(train_GE.main())
"""


def main(argv: list[str] | None = None) -> int:
    """Print the figures; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.training_speed",
        description="Speed and memory of training beside a plain loop. Flags after -- are those of "
        "train_GE.py, for our side; flags of the network are for both.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="device to train on")
    add("--network", default="cifar100", choices=["cifar100", "imagenet"], help="preset")
    add("--what", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="parts to measure")
    add("--stages", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="stages to compare")
    add(
        "--batch-size", type=at_least(1), default=128, metavar="N", help="images per step, over all processes"
    )
    add(
        "--steps",
        type=at_least(1),
        default=6,
        metavar="N",
        help="steps per round; 50 is a good choice on CUDA",
    )
    add("--rounds", type=at_least(1), default=5, metavar="N", help="rounds after one to warm up")
    add("--images", type=at_least(1), default=50_000, metavar="N", help="training images")
    add(
        "--profile",
        action="store_true",
        help="also print the operations that take most of a step of ours, in one process",
    )
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:end])
    arguments.flags = argv[end + 1 :]
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here")
        if arguments.device == "cpu" and torch.cuda.is_available():  # which train_GE.py would take
            raise UserError("--device cpu: hide the GPU by CUDA_VISIBLE_DEVICES= in front of the command")
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return 0


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print all requested figures; ``folder`` takes the images."""
    arguments.data_root = folder / "images"
    parse("GE", _flags(arguments))  # a mistake in the flags for our side
    (write_archive if arguments.network == "cifar100" else write_folder)(
        arguments.data_root, arguments.images
    )
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{available_cores()} CPU cores"
    _print(
        f"{arguments.network}: {arguments.images:,} images, batch {arguments.batch_size}, {where}, "
        f"torch {torch.__version__}"
    )
    for stage in arguments.stages:
        if {"speed", "busy", "memory"} & set(arguments.what):
            _compare(stage, arguments)
        if arguments.profile:
            _profile(stage, arguments)
    if "startup" in arguments.what and arguments.network == "cifar100":
        for kind in ("empty", "full"):
            seconds, silence = _startup(arguments, folder)
            _print(
                f"start to the first step, {kind} cache of compiled code: {seconds:.1f} s, "
                f"longest silence {silence:.1f} s"
            )


def _compare(stage: int, arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        sides = {side: stack.enter_context(elsewhere(side, stage, arguments)) for side in SIDES}
        rates: dict[str, list[float]] = {}
        peaks = dict.fromkeys(sides, 0)
        for number in range(arguments.rounds + 1):
            for side, run in sides.items():
                images, seconds, memory = run(arguments.steps)
                if number:
                    rates.setdefault(side, []).append(images / seconds)
                    peaks[side] = max(peaks[side], memory)
                if number and "busy" in arguments.what:
                    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other_program:
                        try:
                            images, seconds, _ = run(arguments.steps)
                        finally:
                            other_program.kill()
                    rates.setdefault(f"{side}, busy", []).append(images / seconds)
    ours, other = (statistics.median(rates[side]) for side in ("ours", "plain loop"))
    ratio = _ratio(rates["ours"], rates["plain loop"])
    _print(
        f"stage {stage}, images/s: plain loop {other:,.1f}, ours {ours:,.1f}, ours / plain loop {ratio:.3f}"
    )
    for side in SIDES:
        if "busy" in arguments.what:
            _print(f"  {side}: beside a busy core / quiet {_ratio(rates[f'{side}, busy'], rates[side]):.3f}")
        if "memory" in arguments.what:
            _print(f"  {side}: peak memory of all processes {peaks[side] / 2**20:,.0f} MiB")
    if arguments.device == "cuda":
        minutes = SCHEDULE_EPOCHS[stage] * SCHEDULE_IMAGES / ours / 60
        _print(f"  {SCHEDULE_EPOCHS[stage]} epochs of {SCHEDULE_IMAGES:,} images: {minutes:.1f} minutes")


class Ours:
    """Training of one stage by this project, in one of its processes."""

    def __init__(self, stage_number: int, arguments: argparse.Namespace, processes: Processes):
        settings, stage = parse("GE", _flags(arguments)).settings(), train_GE.Stage1()
        data = load_data(settings, processes.device, processes.shard)
        seed_everything(settings.seed, settings.deterministic)
        network = stage.make_network(settings, data.info, None)
        operations = count_operations(network, data.info.image_size)[-1]
        operations_per_process = operations * data.train.num_images // processes.world_size
        if stage_number == 2:
            stage = train_IMTA.Stage2()
            settings = parse("IMTA", _flags(arguments)).settings(origin_recipe=vars(settings))
            origin = SimpleNamespace(path=Path("random weights"), network=network.eval())
            network = stage.make_network(settings, data.info, origin)
        # As in a training of the published length.
        settings = resolve_auto(
            settings,
            processes,
            network,
            data.info.image_size,
            operations,
            operations_per_process=operations_per_process,
            compile_speedup_share=stage.compile_speedup_share(settings),
        )
        self.settings = settings
        operations_per_step = operations * arguments.batch_size // processes.world_size
        prepare_network_and_device(network, settings, processes.device, operations_per_step)
        self.stepper = Stepper(stage.make_objective(network, settings).train(), settings, processes)
        self.meters = Meters(
            network.num_exits, processes.device, only_finite=self.stepper.scaler.is_enabled()
        )
        self.batches = itertools.chain.from_iterable(map(data.train.epoch, itertools.count()))
        self.batch_size, self.processes = data.train.batch_size, processes

    def run(self, steps: int) -> tuple[int, float]:
        """Train for ``steps`` steps, across epochs.

        Returns:
            The number of images of all processes, and the seconds.
        """
        set_tf32(self.settings.tf32)
        _wait()
        began = time.perf_counter()
        for _, (images, targets) in zip(range(steps), self.batches, strict=False):
            self.stepper.step(images, targets, LEARNING_RATE, self.meters.update)
        _wait()
        self.processes.all_reduce_max(0)
        return steps * self.batch_size, time.perf_counter() - began


def _flags(arguments: argparse.Namespace) -> list[str]:
    given = {
        "--preset": arguments.network,
        "--data-root": arguments.data_root,
        "--val-size": 0,
        "--lr": LEARNING_RATE,
    }
    given["--batch-size"] = arguments.batch_size
    return [str(word) for flag in given.items() for word in flag] + arguments.flags


def plain(stage_number: int, arguments: argparse.Namespace) -> PlainLoop:
    """Build the plain loop of a stage, on the same network."""
    settings = parse("GE", _flags(arguments)).settings()
    seed_everything(settings.seed, settings.deterministic)
    dataset, info = plain_dataset(arguments.network, arguments.data_root)
    network = train_GE.Stage1().make_network(settings, info, None)
    network = IMTA(network, freeze_batchnorm=False) if stage_number == 2 else network
    return PlainLoop(
        network, dataset, arguments.batch_size, WORKERS, LEARNING_RATE, torch.device(arguments.device)
    )


@contextmanager
def elsewhere(
    side: str, stage_number: int, arguments: argparse.Namespace
) -> Iterator[Callable[[int], tuple[int, float, int]]]:
    """Run one side in processes of its own, so that its memory and settings do not reach the other.

    Yields:
        A function that runs the given number of steps and returns the number of images, the seconds and the
        peak memory of all processes of the side, in bytes.
    """
    connection, other_end = multiprocessing.Pipe()
    process = SPAWN.Process(
        target=_obey, args=(other_end, side, stage_number, arguments)
    )  # not a daemon: it may have workers
    with _default_waits() if side == "plain loop" else nullcontext():
        process.start()
    other_end.close()  # so that the connection ends with the process

    def run(steps: int) -> tuple[int, float, int]:
        peak = 0
        try:
            connection.send(steps)
            while not connection.poll(0.3):
                peak = max(peak, _memory_of_family(process.pid))
            images, seconds = connection.recv()
        except (EOFError, OSError):
            raise UserError("one side of the comparison ended before it was done") from None
        return images, seconds, max(peak, _memory_of_family(process.pid))

    try:
        yield run
    finally:
        with suppress(OSError):  # it is gone
            connection.send(0)
        process.join()


@contextmanager
def _default_waits() -> Iterator[None]:
    """Start processes without the OMP_WAIT_POLICY that ``train_GE`` has set."""
    policy = os.environ.pop("OMP_WAIT_POLICY")
    try:
        yield
    finally:
        os.environ["OMP_WAIT_POLICY"] = policy


def _obey(connection: Connection, side: str, stage_number: int, arguments: argparse.Namespace) -> None:
    # Start the workers of the plain loop in the platform's default way.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    accept_random_archive()
    if side == "plain loop":
        torch.set_num_threads(available_cores())
        loop = plain(stage_number, arguments)
        while steps := connection.recv():
            connection.send(loop.run(steps))
        return
    accumulate = parse("GE", _flags(arguments)).settings().accumulate
    with training_processes(arguments.batch_size, None, accumulate=accumulate) as processes:
        ours = Ours(stage_number, arguments, processes)
        while steps := processes.all_reduce_max(connection.recv() if processes.is_main else 0):
            result = ours.run(steps)
            if processes.is_main:
                connection.send(result)
    exit_worker(0)


def _memory_of_family(pid: int) -> int:
    """Return the bytes of a process and its descendants, or 0 without /proc.

    Pages that several processes share are counted once.
    """
    total, family = 0, [pid]
    while family:
        member = family.pop()
        with suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
            for thread in Path(f"/proc/{member}/task").iterdir():
                family += map(int, (thread / "children").read_text().split())
    return total


def _startup(arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Return the seconds until train_GE.py ends its first step, and the longest time without output."""
    command = [
        *(sys.executable, "-u", "-c", PROGRAM, *_flags(arguments), "--print-freq", "1"),
        *("--save", str(folder / "run"), "--overwrite"),
    ]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    began = last = time.perf_counter()
    silence, line = 0.0, ""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=root, env=environment, **streams) as process:
        for line in process.stdout:
            now = time.perf_counter()
            silence, last = max(silence, now - last), now
            if FIRST_STEP.match(line):
                process.terminate()
                return last - began, silence
    raise UserError(f"train_GE.py did not reach its first step: {line.strip()}")


def _profile(stage_number: int, arguments: argparse.Namespace) -> None:
    """Print the operations that take most of a step."""
    device = torch.device(arguments.device)
    accept_random_archive()
    loop = Ours(stage_number, arguments, Processes(0, 1, device, (0,) if device.type == "cuda" else ()))
    loop.run(2)
    with torch.profiler.profile() as profiler:
        loop.run(1)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    _print(
        f"a step of stage {stage_number}, ours:\n"
        f"{profiler.key_averages().table(order, row_limit=12, max_name_column_width=48)}"
    )


def accept_random_archive() -> None:
    """Make torchvision skip the checksums, which the archive of ``write_archive`` does not match."""
    cifar.check_integrity = lambda *_: True


def write_archive(folder: Path, num_images: int) -> None:
    """Write random images as torchvision's archive of CIFAR-100, a fifth as many for testing."""
    content = folder / CIFAR100.base_folder
    content.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for part, count in (("train", num_images), ("test", max(num_images // 5, 1))):
        pixels = rng.integers(256, size=(count, 3 * 32 * 32), dtype=np.uint8)
        parts[part] = {"data": pixels, "fine_labels": rng.integers(100, size=count).tolist()}
    for part, entries in parts.items():
        (content / part).write_bytes(pickle.dumps(entries))


def write_folder(folder: Path, num_images: int) -> None:
    """Write smooth random JPEGs of 256 pixels in folders of classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", num_images), ("test", 8)):
        for i in range(count):
            path = folder / part / f"class {i % 8}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).resize((256, 256)).save(path)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _ratio(rates: list[float], others: list[float]) -> float:
    """Return the median ratio over rounds; other load on the machine slows both sides of a round alike."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


if __name__ == "__main__":
    sys.exit(main())
