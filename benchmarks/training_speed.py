"""Speed and memory of training beside a plain loop, measured in one run.

    python -m benchmarks.training_speed                                # everything, on two CPU threads
    python -m benchmarks.training_speed --device cuda
    python -m benchmarks.training_speed --what stage2 --profile
    python -m benchmarks.training_speed --what stage1 -- --amp bf16    # flags of train_GE.py, for our side

The plain loop (``benchmarks.plain_loop``) is what programs of this field usually do. Ours is the trainer of this project with the settings
of ``--preset cifar100``. Both train the same network on the same images: random bytes in the format of torchvision's archive. They take
turns, each in a process of its own, a round of steps each, and are compared within the rounds, so that another program on the machine slows
both alike; medians over the rounds are printed. Workers of the plain loop load up to four batches while it is not its turn, which favours
it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torchvision import datasets

import train_GE
import train_IMTA
from args import parse
from benchmarks.plain_loop import PlainLoop, PlainStage2
from dataloader import Batch, Batches, load_data
from datasets import NORMALIZATION, DataInfo
from engine.checkpoint import Saved
from engine.distributed import Processes
from engine.stage import for_device, place
from engine.stepper import Stepper
from engine.training import Meters
from models import count_operations
from utils import CommandLineParser, UserError, seed_everything, set_tf32

PARTS = ("stage1", "stage2", "memory", "loading", "scaling", "startup", "schedule")
CIFAR_IMAGES = 50_000
SCALING_IMAGES = (1_000, 10_000, CIFAR_IMAGES)
SCHEDULE_IMAGES, SCHEDULE_EPOCHS, SCHEDULE_BATCH = 45_000, {1: 300, 2: 180}, 512  # the published CIFAR-100 settings
LEARNING_RATE = 0.01  # the labels are random: with the published rate the loss would soon not be finite
MEMORY_STEPS = 3
FIRST_STEP = re.compile(r"epoch 1/\d+ 1/")

# Ours against the plain loop by stage. On a CPU stage 2 is held against our stage 1 instead: a plain loop, too, is faster there.
SPEED_GOALS = {"cpu": {1: 1.2}, "cuda": {1: 4.0, 2: 10.0}}
STAGE_2_GOAL = {"cpu": 3.0}
MEMORY_GOAL, LOADING_GOAL, SCALING_GOAL, STARTUP_GOAL = 1.0, 0.05, 0.95, 15.0

# Forked from a process that has imported everything and done nothing: a fork of this one would bring its threads and memory along.
AFRESH = multiprocessing.get_context("forkserver")
AFRESH.set_forkserver_preload(["train_GE", "train_IMTA", "benchmarks.plain_loop"])

PROGRAM = """\
import sys
from pathlib import Path
import train_GE
from benchmarks.training_speed import known_archive
with known_archive(Path(sys.argv[1])):
    sys.exit(train_GE.main(sys.argv[2:]))
"""


def main(argv: list[str] | None = None) -> int:
    """Print the figures; the exit status is 0 whatever they are, and 2 after a mistake."""
    parser = CommandLineParser(
        prog="benchmarks.training_speed",
        description="Speed and memory of training beside a plain loop. Flags after -- are those of train_GE.py, for our side; flags of the "
        "network are for both.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of PyTorch (default: %(default)s)")
    parser.add_argument("--what", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (default: all; schedule on CUDA)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps a round (default: 6, on CUDA 50)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after one to warm up (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of the plain loop (default: %(default)s)")
    parser.add_argument("--images", type=int, default=CIFAR_IMAGES, metavar="N", help="training images (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print the operations that take most of a step of ours")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    options.flags = argv[end + 1 :]
    options.what = options.what or [part for part in PARTS if part != "schedule" or options.device == "cuda"]
    options.steps = options.steps or (50 if options.device == "cuda" else 6)
    torch.set_num_threads(options.threads)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here")
        if options.batch_size > options.images:
            raise UserError(f"--batch-size {options.batch_size} is more than --images {options.images}")
        with tempfile.TemporaryDirectory() as folder:
            Benchmark(options, Path(folder)).run()
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return 0


class Ours:
    """A stage's training by this project."""

    def __init__(self, stage_number: int, archive: Path, options: argparse.Namespace, batch_size: int | None = None):
        device = torch.device(options.device)
        processes = Processes(0, 1, device, (0,) if device.type == "cuda" else ())
        settings_1 = parse("GE", _flags(archive, options, batch_size)).settings()
        stage, settings = train_GE.STAGE, settings_1
        if stage_number == 2:
            stage = train_IMTA.STAGE
            settings = parse("IMTA", _flags(archive, options, batch_size)).settings(inherited=vars(settings_1))
        settings = for_device(stage, settings, device)
        with known_archive(archive):
            self.batches = load_data(settings, device).train
        seed_everything(settings.seed, settings.deterministic)
        info = _data_info(options)
        self.network = train_GE.STAGE.make_network(settings_1, info, None)
        if stage_number == 2:
            self.network = stage.make_network(settings, info, Saved(Path("random weights"), self.network.eval(), {}))
        place(self.network, settings, processes)
        objective = stage.make_objective(self.network, settings).train()
        self.settings = settings
        self.stepper = Stepper(objective, settings, processes)
        self.meters = Meters(self.network.num_exits, device, only_finite=self.stepper.scaler.is_enabled())
        self._epoch, self._rest = 0, iter(())

    def run(self, steps: int) -> tuple[int, float]:
        """Images and seconds of the next ``steps`` steps; a new epoch begins when one ends."""
        set_tf32(self.settings.tf32)  # of the whole process, and the plain loop has its own
        images_done = 0
        _wait()
        began = time.perf_counter()
        for _ in range(steps):
            images, targets = self._next_batch()
            images_done += len(targets)
            self.stepper.step(images, targets, LEARNING_RATE, self.meters.update)
        _wait()
        return images_done, time.perf_counter() - began

    def _next_batch(self) -> Batch:
        batch = next(self._rest, None)
        if batch is None:
            self._rest = self.batches.epoch(self._epoch)
            self._epoch += 1
            batch = next(self._rest)
        return batch


def _flags(archive: Path, options: argparse.Namespace, batch_size: int | None) -> list[str]:
    ours = {"--preset": "cifar100", "--data-root": archive, "--val-size": 0, "--lr": LEARNING_RATE}
    ours["--batch-size"] = batch_size or options.batch_size
    return [str(word) for flag in ours.items() for word in flag] + options.flags


def plain(stage_number: int, archive: Path, options: argparse.Namespace) -> PlainLoop:
    """The plain loop of a stage, on the same network."""
    settings = parse("GE", _flags(archive, options, None)).settings()
    seed_everything(settings.seed, settings.deterministic)
    info = _data_info(options)
    network = train_GE.STAGE.make_network(settings, info, None)
    if stage_number == 2:
        network = PlainStage2(network)
    with known_archive(archive):
        return PlainLoop(
            network, archive, (info.mean, info.std), options.batch_size, options.workers, LEARNING_RATE, torch.device(options.device)
        )


def _data_info(options: argparse.Namespace) -> DataInfo:
    mean, std = NORMALIZATION["cifar100"]
    return DataInfo("cifar100", _class_names(), 32, list(mean), list(std), options.images, "")


SIDES = {"plain loop": plain, "ours": Ours}


class ElsewhereLoop:
    """A side in a process of its own, which does what it is told: memory and settings of one side do not reach the other."""

    def __init__(self, side: str, stage_number: int, archive: Path, options: argparse.Namespace):
        self.connection, self.other_end = multiprocessing.Pipe()
        arguments = (self.other_end, side, stage_number, archive, options)
        # Not a daemon: it may have workers.
        self.process = AFRESH.Process(target=_obey, args=arguments)

    def __enter__(self) -> "ElsewhereLoop":
        self.process.start()
        self.other_end.close()  # so that the connection ends with the process
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it is gone
            self.connection.send(0)
        self.process.join()

    def run(self, steps: int) -> tuple[int, float]:
        """As of the side itself."""
        try:
            self.connection.send(steps)
            return self.connection.recv()
        except (EOFError, OSError):
            raise UserError("one side of the comparison ended before it was done") from None


def _obey(connection: Connection, side: str, stage_number: int, archive: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    # The workers of the plain loop start as those of a plain program do.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    loop = SIDES[side](stage_number, archive, options)
    while steps := connection.recv():
        connection.send(loop.run(steps))


class Benchmark:
    """All parts on one device; ``folder`` takes the images."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.archive = write_archive(folder / str(options.images), options.images)
        self.stages = [number for number in (1, 2) if f"stage{number}" in options.what] or [1, 2]

    def run(self) -> None:
        """Print everything that was asked for."""
        options = self.options
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
        _print(f"{options.images:,} images, batch {options.batch_size}, {where}, torch {torch.__version__}")
        if {"stage1", "stage2"} & set(options.what):
            self.speed()
        for part in PARTS[2:]:
            if part in options.what:
                getattr(self, part)()
        if options.profile:
            self.profile()

    def speed(self) -> None:
        """Images a second of both sides; where stage 2 is measured, stage 1 is too."""
        numbers = sorted({1, *self.stages})
        network = train_GE.STAGE.make_network(
            parse("GE", _flags(self.archive, self.options, None)).settings(), _data_info(self.options), None
        )
        operations = count_operations(network, 32)
        sides = [(side, number) for number in numbers for side in SIDES]
        with ExitStack() as stack:
            loops = {key: stack.enter_context(ElsewhereLoop(*key, self.archive, self.options)) for key in sides}
            rates = self.rates(loops)
        _print(f"{len(operations)} exits, {operations[-1] / 1e6:.2f} million operations; images a second:")
        for number in numbers:
            ours, other = rates["ours", number], rates["plain loop", number]
            _print(f"stage {number}: plain loop {statistics.median(other):,.1f}, ours {statistics.median(ours):,.1f}")
            _verdict("  ours / plain loop", _ratio(ours, other), at_least=SPEED_GOALS[self.options.device].get(number))
        if 2 in numbers:
            ratio = _ratio(rates["ours", 2], rates["ours", 1])
            _verdict("  stage 2 / stage 1, both ours", ratio, at_least=STAGE_2_GOAL.get(self.options.device))

    def memory(self) -> None:
        """Peak of each side in a process of its own: the GPU's, or main memory beyond what imports take, worker processes included."""
        if self.options.device == "cpu" and not Path("/proc/self/smaps_rollup").exists():
            _print("peak memory: not measured, it is read from Linux's /proc")
            return
        _print(f"peak memory, {MEMORY_STEPS} steps:")
        for number in self.stages:
            peaks = {side: _in_new_process(_peak_memory, side, number, self.archive, self.options) for side in SIDES}
            for side, (own, of_workers) in peaks.items():
                workers = f", and {_mebibytes(of_workers)} of its workers" if of_workers else ""
                _print(f"  stage {number}, {side}: {_mebibytes(own)}{workers}")
            _verdict("    ours / plain loop", sum(peaks["ours"]) / sum(peaks["plain loop"]), at_most=MEMORY_GOAL)

    def loading(self) -> None:
        """Share of a step that its batch takes: crop, flip and normalisation, and the epoch's order spread over its steps."""
        for number in self.stages:
            loop = Ours(number, self.archive, self.options)
            batches, share = loop.batches, []
            for _ in range(self.options.rounds + 1):
                images, seconds = loop.run(self.options.steps)
                share.append(_seconds_to_load(batches, self.options.steps) / (seconds / (images / batches.batch_size)))
            _verdict(f"stage {number}: augmentation and loading / step", statistics.median(share[1:]), at_most=LOADING_GOAL)

    def scaling(self) -> None:
        """Whether an image costs the same in large data sets."""
        sizes = sorted({min(size, self.options.images) for size in SCALING_IMAGES})
        loops = {size: Ours(1, write_archive(self.folder / str(size), size), self.options) for size in sizes}
        rates = {size: statistics.median(rounds) for size, rounds in self.rates(loops).items()}
        figures = ", ".join(f"{rate:,.1f} with {size:,}" for size, rate in rates.items())
        _print(f"stage 1, images a second by images of the data set: {figures}")
        _verdict("  slowest / fastest", min(rates.values()) / max(rates.values()), at_least=SCALING_GOAL)

    def startup(self) -> None:
        """From the start of train_GE.py to the end of its first step."""
        _verdict(f"start-up to the first step, {self.options.images:,} images, in seconds", self._startup_seconds(), at_most=STARTUP_GOAL)

    def schedule(self) -> None:
        """How long the published schedule would take, without its evaluations."""
        batch_size = min(SCHEDULE_BATCH, self.options.images)
        loops = {number: Ours(number, self.archive, self.options, batch_size) for number in SCHEDULE_EPOCHS}
        minutes = {
            number: SCHEDULE_EPOCHS[number] * SCHEDULE_IMAGES / statistics.median(rates) / 60 for number, rates in self.rates(loops).items()
        }
        parts = ", ".join(f"stage {n} ({SCHEDULE_EPOCHS[n]} epochs) {m:,.1f}" for n, m in minutes.items())
        _print(f"published schedule at batch {batch_size}, steps alone, in minutes: {parts}, together {sum(minutes.values()):,.1f}")

    def profile(self) -> None:
        """The operations that take most of a step."""
        for number in self.stages:
            loop = Ours(number, self.archive, self.options)
            loop.run(2)
            activities = [torch.profiler.ProfilerActivity.CPU]
            order = "self_cpu_time_total"
            if self.options.device == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                order = "self_device_time_total"
            with torch.profiler.profile(activities=activities) as profiler:
                loop.run(1)
            _print(f"a step of stage {number}, ours:")
            _print(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=48))

    def rates(self, loops: dict) -> dict[Any, list[float]]:
        """Images a second of every loop in every round; they take turns."""
        measured: dict = {name: [] for name in loops}
        for _ in range(self.options.rounds + 1):
            for name, loop in loops.items():
                images, seconds = loop.run(self.options.steps)
                measured[name].append(images / seconds)
        return {name: rates[1:] for name, rates in measured.items()}

    def _startup_seconds(self) -> float:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads)}
        if self.options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-c", PROGRAM, str(self.archive), *_flags(self.archive, self.options, None), "--print-freq", "1"]
        command += ["--save", str(self.folder / "run"), "--overwrite"]
        began = time.perf_counter()
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            first = next((line for line in process.stdout if FIRST_STEP.match(line)), None)
            seconds = time.perf_counter() - began
            process.terminate()
            errors = process.communicate()[1]
        if first is None:
            raise UserError(f"train_GE.py did not reach its first step: {errors.strip().splitlines()[-1]}")
        return seconds


def write_archive(folder: Path, num_images: int) -> Path:
    """Random images in the format of torchvision's archive of CIFAR-100, a fifth as many test images; returns ``folder``."""
    content = folder / datasets.CIFAR100.base_folder
    if content.exists():
        return folder
    content.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", num_images), ("test", max(num_images // 5, 1))):
        pixels = rng.integers(256, size=(count, 3 * 32 * 32), dtype=np.uint8)
        _write_part(content / part, {"data": pixels, "fine_labels": rng.integers(100, size=count).tolist()})
    _write_part(content / "meta", {"fine_label_names": _class_names()})
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in content.iterdir()}
    (folder / "digests.json").write_text(json.dumps(digests))
    return folder


@contextmanager
def known_archive(folder: Path) -> Iterator[None]:
    """Within the block torchvision takes the archive in ``folder`` for CIFAR-100, after checking its digests as it does the real one's."""
    digests = json.loads((folder / "digests.json").read_text())
    lists = {f"{part}_list": [[part, digests[part]]] for part in ("train", "test")}
    meta = {**datasets.CIFAR100.meta, "md5": digests["meta"]}
    with mock.patch.multiple(datasets.CIFAR100, **lists, meta=meta):
        yield


def _write_part(path: Path, content: dict) -> None:
    with path.open("wb") as stream:
        pickle.dump(content, stream)


def _class_names() -> list[str]:
    return [f"class {i}" for i in range(100)]


def _seconds_to_load(batches: Batches, count: int) -> float:
    """Seconds a step for its batch."""
    _wait()
    began = time.perf_counter()
    epoch = batches.epoch(0)
    next(epoch)
    _wait()
    started = time.perf_counter()
    done = sum(1 for _, _ in zip(range(count), epoch, strict=False))
    _wait()
    seconds = (time.perf_counter() - started) / max(done, 1)
    return seconds + (started - began - seconds) / len(batches)


def _in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=AFRESH) as pool:
        return pool.submit(function, *arguments).result()


def _peak_memory(side: str, stage_number: int, archive: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes of this process, and of its workers."""
    torch.set_num_threads(options.threads)
    # A new process would start its own workers afresh, too: back to the platform's default, so that they are those of a plain program.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    before = _memory("self/status", "VmRSS")
    loop = SIDES[side](stage_number, archive, options)
    loop.run(MEMORY_STEPS)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated(), 0
    # Pages that a worker shares with this process are counted once.
    workers = sum(_memory(f"{child.pid}/smaps_rollup", "Private_") for child in multiprocessing.active_children())
    return _memory("self/status", "VmHWM") - before, workers


def _memory(file: str, entry: str) -> int:
    """Bytes under the entries of a file in /proc that begin with ``entry``."""
    lines = (Path("/proc") / file).read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _ratio(rates: list[float], others: list[float]) -> float:
    """Median over rounds: what else the machine does slows both sides of a round alike."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


def _verdict(what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
    goal = ""
    if at_least is not None:
        goal = f" (goal: at least {at_least:g}, {'reached' if value >= at_least else 'not reached'})"
    if at_most is not None:
        goal = f" (goal: at most {at_most:g}, {'reached' if value <= at_most else 'not reached'})"
    _print(f"{what}: {value:.3f}{goal}")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
