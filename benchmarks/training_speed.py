"""Speed, memory and start-up of training beside a plain loop, measured in one run.

    python -m benchmarks.training_speed                                # everything, on all cores of this machine
    python -m benchmarks.training_speed --network imagenet --what speed --images 256 --batch-size 32 --steps 2
    python -m benchmarks.training_speed --device cuda
    python -m benchmarks.training_speed --what speed --profile -- --compile off    # flags of train_GE.py, for our side

The plain loop (``benchmarks.plain_loop``) is what programs of this field usually do, one process with a thread a core. Ours is the trainer
of this project with its defaults: on a CPU a process a core. Both train the same network on the same random images. They take turns, each
in processes of its own, a round of steps each, and are compared within the rounds, so that another program on the machine slows both alike;
medians over the rounds are printed. Workers of the plain loop load up to four batches while it is not its turn, which favours it.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

import train_GE
import train_IMTA
from args import parse
from benchmarks.plain_loop import PlainLoop, PlainStage2, plain_dataset
from dataloader import Batch, load_data
from engine.checkpoint import Saved
from engine.device import seed_everything, set_tf32
from engine.distributed import Processes
from engine.launch import leave_copy, shared_out
from engine.log import Log
from engine.run_directory import RunDirectory
from engine.session import Session
from engine.stage import place, with_compilation, with_precision
from engine.stepper import Stepper
from engine.training import Meters
from models import count_operations
from settings import available_cores
from utils import CommandLineParser, UserError

PARTS = ("speed", "busy", "memory", "startup")
LEARNING_RATE = 0.01  # the labels are random: with the published rate the loss would soon not be finite
FIRST_STEP = re.compile(r"epoch 1/\d+ 1/")
SCHEDULE_IMAGES, SCHEDULE_EPOCHS = 45_000, {1: 300, 2: 180}  # the published CIFAR-100 settings

SPEED_GOALS = {"cpu": {1: 3.0, 2: 8.0}, "cuda": {1: 4.0, 2: 10.0}}
BUSY_GOAL, MEMORY_GOAL, COLD_GOAL, WARM_GOAL, SILENCE_GOAL, SCHEDULE_GOAL = 0.4, 2.2, 150.0, 30.0, 10.0, 20.0

# Forked from a process that has imported everything and done nothing: a fork of this one would bring its threads and memory along.
AFRESH = multiprocessing.get_context("forkserver")
AFRESH.set_forkserver_preload(["train_GE", "train_IMTA", "benchmarks.plain_loop"])

PROGRAM = """\
import sys
from pathlib import Path
from args import announce
announce("GE")
import train_GE
from benchmarks.training_speed import known_archive
with known_archive(Path(sys.argv[sys.argv.index("--data-root") + 1])):
    sys.exit(train_GE.main())
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
    parser.add_argument("--network", default="cifar100", choices=["cifar100", "imagenet"], help="preset (default: %(default)s)")
    parser.add_argument(
        "--what", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="(default: both)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a step, in all (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps a round (default: 6, on CUDA 50)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="after one to warm up (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of the plain loop (default: %(default)s)")
    parser.add_argument("--images", type=int, default=50_000, metavar="N", help="training images (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print the operations that take most of a step of ours, in one process")
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    options.flags = argv[end + 1 :]
    options.steps = options.steps or (50 if options.device == "cuda" else 6)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no GPU here")
        if options.batch_size > options.images:
            raise UserError(f"--batch-size {options.batch_size} is more than --images {options.images}")
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder))
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    return 0


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Print everything that was asked for; ``folder`` takes the images."""
    options.data_root = (write_archive if options.network == "cifar100" else write_folder)(folder / "images", options.images)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{available_cores()} CPU cores"
    _print(f"{options.network}: {options.images:,} images, batch {options.batch_size}, {where}, torch {torch.__version__}")
    for stage in options.stages:
        if {"speed", "busy", "memory"} & set(options.what):
            _compare(stage, options)
        if options.profile:
            _profile(stage, options)
    if "startup" in options.what and options.network == "cifar100":
        cache = folder / "cache"
        for kind, goal in (("empty", COLD_GOAL), ("full", WARM_GOAL)):
            seconds, silence = _startup(options, folder, cache)
            _verdict(f"start to the first step, {kind} cache of compiled code, in seconds", seconds, at_most=goal)
            _verdict("  longest silence", silence, at_most=SILENCE_GOAL)


def _compare(stage: int, options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        sides = {side: stack.enter_context(Elsewhere(side, stage, options)) for side in SIDES}
        busy_core = stack.enter_context(BusyCore())
        rates: dict[str, list[float]] = {}
        peaks = dict.fromkeys(sides, 0)
        for number in range(options.rounds + 1):
            for side, loop in sides.items():
                images, seconds, memory = loop.run(options.steps)
                if number:
                    rates.setdefault(side, []).append(images / seconds)
                    peaks[side] = max(peaks[side], memory)
                if number and "busy" in options.what and options.device == "cpu":
                    with busy_core.at_work():
                        images, seconds, _ = loop.run(options.steps)
                    rates.setdefault(f"{side}, busy", []).append(images / seconds)
        memory = {side: f"{peaks[side] / 2**20:,.0f} MiB" for side in sides}
    ours, other = (statistics.median(rates[side]) for side in ("ours", "plain loop"))
    _print(f"stage {stage}, images/s: plain loop {other:,.1f}, ours {ours:,.1f}")
    _verdict("  ours / plain loop", _ratio(rates["ours"], rates["plain loop"]), at_least=SPEED_GOALS[options.device][stage])
    if "ours, busy" in rates:
        for side, goal in (("ours", BUSY_GOAL), ("plain loop", None)):
            _verdict(f"  {side}: beside a busy core / quiet", _ratio(rates[f"{side}, busy"], rates[side]), at_least=goal)
    if "memory" in options.what and all(peaks.values()):
        _print(f"  peak memory of all processes: plain loop {memory['plain loop']}, ours {memory['ours']}")
        _verdict("    ours / plain loop", peaks["ours"] / peaks["plain loop"], at_most=MEMORY_GOAL)
    if options.device == "cuda":
        minutes = SCHEDULE_EPOCHS[stage] * SCHEDULE_IMAGES / ours / 60
        _verdict(f"  {SCHEDULE_EPOCHS[stage]} epochs of {SCHEDULE_IMAGES:,} images, in minutes", minutes, at_most=SCHEDULE_GOAL)


class Ours:
    """A stage's training by this project, in one of its processes."""

    def __init__(self, stage_number: int, options: argparse.Namespace, processes: Processes):
        parsed = parse("GE", _flags(options)).settings()
        stage: train_GE.Stage1 | train_IMTA.Stage2 = train_GE.Stage1()
        settings = parsed
        if stage_number == 2:
            stage, settings = train_IMTA.Stage2(), parse("IMTA", _flags(options)).settings(inherited=vars(parsed))
        settings = with_precision(settings, processes)
        if processes.device.type == "cpu" and settings.amp == "bf16":
            torch.set_num_threads(1)
        with known_archive(options.data_root):
            data = load_data(settings, processes.device, processes.shard)
        seed_everything(settings.seed, settings.deterministic)
        self.batches, self.processes = data.train, processes
        network = train_GE.Stage1().make_network(parsed, data.info, None)
        operations = count_operations(network, data.info.image_size)[-1] * self.batches.num_images // processes.world_size
        # As in a training of the published length.
        settings = with_compilation(settings, stage, operations)
        if stage_number == 2:
            network = stage.make_network(settings, data.info, Saved(Path("random weights"), network.eval(), {}))
        place(network, Session(RunDirectory(Path("none")), settings, processes, Log(False)))
        self.settings = settings
        self.stepper = Stepper(stage.make_objective(network, settings).train(), settings, processes)
        self.meters = Meters(network.num_exits, processes.device, only_finite=self.stepper.scaler.is_enabled())
        self._epoch, self._rest = 0, iter(())

    def run(self, steps: int) -> tuple[int, float]:
        """Images of all processes, and seconds, of the next ``steps`` steps; a new epoch begins when one ends."""
        set_tf32(self.settings.tf32)
        _wait()
        began = time.perf_counter()
        for _ in range(steps):
            images, targets = self._next_batch()
            self.stepper.step(images, targets, LEARNING_RATE, self.meters.update)
        _wait()
        self.processes.largest(0)
        return steps * self.batches.batch_size, time.perf_counter() - began

    def _next_batch(self) -> Batch:
        batch = next(self._rest, None)
        if batch is None:
            self._rest = self.batches.epoch(self._epoch)
            self._epoch += 1
            batch = next(self._rest)
        return batch


def _flags(options: argparse.Namespace) -> list[str]:
    given = {"--preset": options.network, "--data-root": options.data_root, "--val-size": 0, "--lr": LEARNING_RATE}
    given["--batch-size"] = options.batch_size
    return [str(word) for flag in given.items() for word in flag] + options.flags


def plain(stage_number: int, options: argparse.Namespace) -> PlainLoop:
    """The plain loop of a stage, on the same network."""
    settings = parse("GE", _flags(options)).settings()
    seed_everything(settings.seed, settings.deterministic)
    with known_archive(options.data_root):
        dataset, info = plain_dataset(options.network, options.data_root)
        network = train_GE.Stage1().make_network(settings, info, None)
        network = PlainStage2(network) if stage_number == 2 else network
        return PlainLoop(network, dataset, options.batch_size, options.workers, LEARNING_RATE, torch.device(options.device))


SIDES = ("plain loop", "ours")


class Elsewhere:
    """A side in processes of its own, which do what they are told: memory and settings of one side do not reach the other."""

    def __init__(self, side: str, stage_number: int, options: argparse.Namespace):
        self.connection, self.other_end = multiprocessing.Pipe()
        # Not a daemon: it may have workers.
        self.process = AFRESH.Process(target=_obey, args=(self.other_end, side, stage_number, options))

    def __enter__(self) -> "Elsewhere":
        self.process.start()
        self.other_end.close()  # so that the connection ends with the process
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it is gone
            self.connection.send(0)
        self.process.join()

    def run(self, steps: int) -> tuple[int, float, int]:
        """Images and seconds of ``steps`` steps, and the most memory that all processes of the side had meanwhile, in bytes."""
        peak = 0
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.3):
                peak = max(peak, _memory_of_family(self.process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            self.connection.send(steps)
            images, seconds = self.connection.recv()
        except (EOFError, OSError):
            raise UserError("one side of the comparison ended before it was done") from None
        finally:
            ended.set()
            watcher.join()
        return images, seconds, peak


def _obey(connection: Connection, side: str, stage_number: int, options: argparse.Namespace) -> None:
    # The workers of the plain loop start as those of a plain program do.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    if side == "plain loop":
        torch.set_num_threads(available_cores())
        loop = plain(stage_number, options)
        while steps := connection.recv():
            connection.send(loop.run(steps))
        return
    with shared_out(options.batch_size, None) as processes:
        ours = Ours(stage_number, options, processes)
        while steps := processes.largest(connection.recv() if processes.is_main else 0):
            result = ours.run(steps)
            if processes.is_main:
                connection.send(result)
    leave_copy(0)


class BusyCore:
    """Another program that keeps one core busy while it is at work."""

    def __enter__(self) -> "BusyCore":
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block the core is busy."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


def _memory_of_family(pid: int) -> int:
    """Bytes of a process and all below it; pages that several share are counted once. 0 where there is no /proc."""
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


def _startup(options: argparse.Namespace, folder: Path, cache: Path) -> tuple[float, float]:
    """Seconds from the start of train_GE.py to the end of its first step, and the longest time without a line."""
    command = [sys.executable, "-u", "-c", PROGRAM, *_flags(options), "--print-freq", "1", "--save", str(folder / "run"), "--overwrite"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    began = last = time.perf_counter()
    silence, reached = 0.0, False
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, env=environment, **streams) as process:
        for line in process.stdout:
            now = time.perf_counter()
            silence, last = max(silence, now - last), now
            if FIRST_STEP.match(line):
                reached = True
                break
        process.terminate()
        errors = process.communicate()[1]
    if not reached:
        raise UserError(f"train_GE.py did not reach its first step: {errors.strip().splitlines()[-1]}")
    return last - began, silence


def _profile(stage_number: int, options: argparse.Namespace) -> None:
    """The operations that take most of a step."""
    device = torch.device(options.device)
    loop = Ours(stage_number, options, Processes(0, 1, device, (0,) if device.type == "cuda" else ()))
    loop.run(2)
    activities, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        loop.run(1)
    _print(f"a step of stage {stage_number}, ours:")
    _print(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=48))


def write_archive(folder: Path, num_images: int) -> Path:
    """Random images in the format of torchvision's archive of CIFAR-100, a fifth as many test images; returns ``folder``."""
    content = folder / datasets.CIFAR100.base_folder
    content.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", num_images), ("test", max(num_images // 5, 1))):
        pixels = rng.integers(256, size=(count, 3 * 32 * 32), dtype=np.uint8)
        _write_part(content / part, {"data": pixels, "fine_labels": rng.integers(100, size=count).tolist()})
    _write_part(content / "meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in content.iterdir()}
    (folder / "digests.json").write_text(json.dumps(digests))
    return folder


def write_folder(folder: Path, num_images: int) -> Path:
    """Smooth random JPEGs of 256 pixels in folders of classes; returns ``folder``."""
    rng = np.random.default_rng(0)
    for part, count in (("train", num_images), ("test", 8)):
        for i in range(count):
            path = folder / part / f"class {i % 8}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).resize((256, 256)).save(path)
    return folder


@contextmanager
def known_archive(folder: Path) -> Iterator[None]:
    """Within the block torchvision takes an archive in ``folder`` for CIFAR-100, after checking its digests as it does the real one's."""
    record = folder / "digests.json"
    if not record.exists():
        yield
        return
    digests = json.loads(record.read_text())
    lists = {f"{part}_list": [[part, digests[part]]] for part in ("train", "test")}
    with mock.patch.multiple(datasets.CIFAR100, **lists, meta={**datasets.CIFAR100.meta, "md5": digests["meta"]}):
        yield


def _write_part(path: Path, content: dict) -> None:
    with path.open("wb") as stream:
        pickle.dump(content, stream)


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


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
