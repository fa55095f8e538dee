"""Kill, stop, starve and mislead the programs, and count what they do about it.

    python tests/faults.py --kills 200 --inputs 500 --terms 50 --full-disks 20 --seed 0
    python tests/faults.py --only input-17 --seed 0        # one case again

- kill: SIGKILL at random instants of short trainings of both stages, half of them in two processes, of which
  the first one or the worker is killed; after each one nothing runs on, every file is whole or absent, and
  ``--resume`` ends with the weights, the optimiser, the log and the tables of an undisturbed run, bit for
  bit.
- term: the same with SIGTERM and SIGINT, which must end with status 143 or 130 and one line that names
  ``--resume``.
- disk: the same with files that may not grow beyond a random size: one line, status 2.
- input: a damaged file of a finished run: one line and status 2, or work where a bit does not matter; nothing
  is overwritten.

The exit status is 1 if anything failed.
"""

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

import engine.evaluate
from adaptive_inference.promises.deadlines import deadline_rows
from adaptive_inference.timing import measure_blocks, runtime_rows
from image_data import synthetic
from models import load, to_released
from tests.compare import differences, unreadable
from tests.conftest import TINY_DEMO, TINY_FLAGS, TINY_MSDNET_FLAGS, TINY_STAGE_2
from tests.forked import Outcome, prepare, run, workers_of

KINDS = ("kill", "term", "disk", "input")
TRAININGS = {
    "GE": (
        "train_GE",
        [*TINY_FLAGS, "--epochs", "2", "--augment", "standard", "--clip-grad", "5", "--warmup-epochs", "0.5"],
    ),
    "IMTA": ("train_IMTA", [*TINY_STAGE_2, "--epochs", "2"]),
    "IMTA moving": ("train_IMTA", [*TINY_STAGE_2, "--epochs", "2", "--backbone-bn", "moving", "--released"]),
}
START = ["--batch-size", "32", "--epochs", "1", "--save", "../new"]
TINY_GRID = ["--base", "1", "--step", "1", "--stepmode", "lin_grow"]  # as in the demo's preset
CONVERTED = ["../released.pth.tar", "../new/released.safetensors", "--classes", "../classes.txt"]
CONSUMERS = [  # program, command line in a folder beside those of the runs, the file that is damaged
    ("train_GE", ["--save", "../GE", "--resume"], "GE/last.pt"),
    ("train_GE", ["--save", "../GE", "--resume"], "GE/best.safetensors"),
    ("train_GE", ["--save", "../GE", "--evalmode", "dynamic"], "GE/best.safetensors"),
    ("train_GE", ["--save", "../GE", "--evalmode", "runtime"], "GE/policy.json"),
    ("engine.convert", [*CONVERTED, *TINY_MSDNET_FLAGS, *TINY_GRID], "released.pth.tar"),
    ("train_IMTA", ["--save", "../IMTA", "--resume"], "IMTA/last.pt"),
    ("train_IMTA", [*START, "--pretrained", "../GE"], "GE/best.safetensors"),
    ("predict", ["--model", "../GE/best.safetensors", "../good.png"], "GE/best.safetensors"),
    ("predict", ["--model", "../GE/best.safetensors", "../good.png"], "GE/policy.json"),
]
LONGEST_LINE = 1000  # characters
SECONDS_TO_PARSE = 0.05  # a signal that comes while PyTorch loads or arguments are parsed is Python's own
MOST_LEFTOVERS = 1  # temporary files of one killed run; the next one clears them away


def _kill_worker(child: int) -> None:
    """Kill a worker; before there is one, the process that would fork it."""
    os.kill((workers_of(child) or [child])[0], signal.SIGKILL)


def _send(number: signal.Signals, child: int) -> None:
    # A terminal sends Ctrl-C to a whole group of processes; nobody else does.
    (os.kill if number == signal.SIGTERM else os.killpg)(child, number)


def _not_whole(path: Path, most_leftovers: int = 0) -> list[str]:
    problems, leftovers = unreadable(path)
    return problems + [f"{leftovers} temporary files have piled up"] * (leftovers > most_leftovers)


def _unlike(path: Path, wanted: Path) -> list[str]:
    return [f"unlike the undisturbed run: {what}" for what in differences(path, wanted)]


def _truncate(rng: random.Random, path: Path) -> str:
    size = path.stat().st_size
    os.truncate(
        path,
        kept := rng.choice(
            [rng.randrange(size), rng.randrange(min(size, 1000)), max(size - 1 - rng.randrange(200), 0)]
        ),
    )
    return f"cut to {kept} of {size} bytes"


def _flip_bits(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 2, 20]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"with bits flipped at {places}"


def _noise(rng: random.Random, path: Path) -> str:
    start = rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"{", b"\x00" * 64, b"[" * 100_000])
    path.write_bytes(start + rng.randbytes(rng.choice([0, 1, 100, 10_000, 1_000_000])))
    return f"of noise after {start[:8]!r}"


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


class Harness:
    """Runs cases and counts: ``tried`` (what was done), ``failures`` (case and reason).

    When so many of a kind were tried as are ``wanted``, what is under way comes to its end undisturbed.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.wanted: dict[str, int] = {}
        self.seconds: dict[str, float] = {}  # that undisturbed trainings took
        self.tried: Counter[str] = Counter()
        self.failures: list[tuple[str, str]] = []

    def finished(self, name: str, processes: int = 1) -> Path:
        """Return the directory of the undisturbed training ``name`` of ``TRAININGS``; train on first use."""
        path = self.folder / "undisturbed" / str(processes) / name.replace(" ", "_")
        if not path.exists():
            path.parent.mkdir(exist_ok=True, parents=True)
            program, flags = TRAININGS[name]
            command = [*flags, *self._origin(name), "--save", str(path)]
            outcome = run(program, command, path.parent, processes=processes)
            if outcome.status != 0:
                raise SystemExit(f"the undisturbed run {name} ended with {outcome.status}: {outcome.errors}")
            self.seconds[f"{name} {processes}"] = outcome.seconds
        return path

    def _origin(self, name: str) -> list[str]:
        return [] if name == "GE" else ["--pretrained", str(self.finished("GE"))]

    def case(self, name: str) -> None:
        """Run the case ``name``: a kind and a number, which seed its randomness together with the seed."""
        kind, number = name.rsplit("-", 1)
        folder = self.folder / name
        folder.mkdir()
        make = {"disk": self._disk, "input": self._input}.get(
            kind, partial(self._interrupted_again_and_again, kind)
        )
        problems = make(random.Random(f"{self.seed} {name}"), folder, int(number))
        shutil.rmtree(folder, ignore_errors=True)
        for problem in problems:
            problem = problem.encode("ascii", "backslashreplace").decode()
            self.failures.append((name, problem))
            print(f"--only {name} --seed {self.seed}: {problem}", flush=True)

    def _training(
        self, rng: random.Random, number: int, processes: int = 1
    ) -> tuple[str, str, list[str], Path]:
        # Stage 1 moves all weights, so it gets more than its share.
        name = ("GE", "GE", "IMTA", "GE", "IMTA moving")[number % 5]
        wanted, (program, flags) = self.finished(name, processes), TRAININGS[name]
        often = rng.choice(
            [["--save-every-steps", "1"], ["--save-every-steps", "1"], ["--save-every-steps", "3"], []]
        )
        return name, program, [*flags, *self._origin(name), *often], wanted

    def _interrupted_again_and_again(
        self, kind: str, rng: random.Random, folder: Path, number: int
    ) -> list[str]:
        """One training, interrupted at random instants and resumed until it comes to its end."""
        # Trainings in two processes are shorter and meet fewer kills: seven of twelve cases are half of them.
        processes = 2 if number % 12 < 7 else 1
        name, program, flags, wanted = self._training(rng, number, processes)
        problems, path, resume = [], folder / "run", []
        for attempt in range(50):
            number = (
                signal.SIGKILL
                if kind == "kill"
                else rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
            )
            # Later and later, for the day that the machine is slower than when it was left undisturbed.
            instant = rng.random() * self.seconds[f"{name} {processes}"] * (1 + attempt / 10)
            if kind == "term":
                instant += SECONDS_TO_PARSE
            hits_worker = kind == "kill" and processes > 1 and rng.random() < 0.5
            strike = _kill_worker if hits_worker else partial(_send, number)
            if self.tried[kind] >= self.wanted.get(kind, math.inf):
                strike = None
            command = [*flags, *resume, "--save", str(path)]
            outcome = run(program, command, folder, strike, instant, processes=processes)
            victim = "the worker of" if hits_worker else ""
            where = f"{victim} {name} in {processes} processes after {instant:.3f} s {' '.join(resume)}"
            if outcome.left:
                problems.append(f"{where}: {outcome.left} processes run on")
            if outcome.status == 0:
                break
            self.tried[f"{kind} of 2 processes"] += outcome.struck and processes > 1
            self.tried[kind] += outcome.struck
            found = self._wrong_end(kind, outcome, number, hits_worker) + _not_whole(
                path, MOST_LEFTOVERS if kind == "kill" else 0
            )
            problems += [f"{where}: {problem}" for problem in found]
            if outcome.status == 2 or outcome.status is None:  # it does not go on
                return problems
            resume = ["--resume"]
        else:
            return [*problems, "50 resumptions did not bring it to its end"]
        return problems + [
            f"{name} at its end: {problem}" for problem in _not_whole(path) + _unlike(path, wanted)
        ]

    def _wrong_end(self, kind: str, outcome: Outcome, number: int, hits_worker: bool) -> list[str]:
        if outcome.status is None:
            return ["it hangs"]
        # Gloo's C++ code writes lines of its own about a process that vanishes while they connect.
        lines = [line for line in outcome.errors.splitlines() if "tcp/debug_logger.cc" not in line]
        if hits_worker and outcome.status == 1 and len(lines) == 1 and "--resume" in lines[0]:
            return []
        if kind == "kill":
            was_killed = outcome.status == -signal.SIGKILL
            return (
                []
                if was_killed
                else [f"status {outcome.status} before the kill: {outcome.errors.strip()[-300:]}"]
            )
        if outcome.status == 128 + number and len(lines) == 1 and "--resume" in lines[0]:
            return []
        return [
            f"signal {number}: status {outcome.status}, {len(lines)} lines on standard error: {lines[-1:]}"
        ]

    def _disk(self, rng: random.Random, folder: Path, number: int) -> list[str]:
        """Files that may not grow beyond a random size; then they may, and the run goes on."""
        name, program, flags, wanted = self._training(rng, number)
        largest = max(file.stat().st_size for file in wanted.iterdir())
        path, size = folder / "run", rng.randrange(2**16, largest)
        outcome = run(program, [*flags, "--save", str(path)], folder, file_size=size)
        self.tried["disk"] += 1
        problems, lines = _not_whole(path), outcome.errors.splitlines()
        if outcome.status != 2 or len(lines) != 1:
            problems.append(f"status {outcome.status}, {len(lines)} lines on standard error: {lines[-1:]}")
        outcome = run(program, [*flags, "--resume", "--save", str(path)], folder)
        if outcome.status != 0:
            problems.append(
                f"resumed with space, it ends with {outcome.status}: {outcome.errors.strip()[-300:]}"
            )
        else:
            problems += _unlike(path, wanted)
        return [f"{name}, {size} bytes: {problem}" for problem in problems]

    def check_consumers(self) -> None:
        """Check that every program of ``CONSUMERS`` accepts the files before they are damaged."""
        for number, (program, argv, _) in enumerate(CONSUMERS):
            folder = self.folder / f"consumer-{number}"
            folder.mkdir()
            self._make_inputs(folder, random.Random(0))
            outcome = run(program, argv, folder / "cwd", timeout=30)
            if outcome.status != 0:
                raise SystemExit(f"{program} {' '.join(argv)} ended with {outcome.status}: {outcome.errors}")
            shutil.rmtree(folder)

    def _make_inputs(self, folder: Path, rng: random.Random) -> None:
        for name in ("GE", "IMTA"):
            shutil.copytree(self.finished(name), folder / name)
        (folder / "cwd").mkdir()
        Image.frombytes("RGB", (32, 32), rng.randbytes(3072)).save(folder / "good.png")
        network = load(folder / "GE")
        (folder / "classes.txt").write_text("\n".join(network.description.data.class_names), encoding="utf-8")
        torch.save({"arch": "msdnet_ge", "state_dict": to_released(network)}, folder / "released.pth.tar")

    def _input(self, rng: random.Random, folder: Path, number: int) -> list[str]:
        """A file cut short, with flipped bits or full of noise, and a program that reads it."""
        self._make_inputs(folder, rng)
        (program, argv, name), damage = rng.choice(CONSUMERS), (_truncate, _flip_bits, _noise)[number % 3]
        described, before = (
            f"{name} {damage(rng, folder / name)}, {program} {' '.join(argv)}",
            _snapshot(folder),
        )
        outcome = run(program, argv, folder / "cwd", timeout=30)
        self.tried["input"] += 1
        lines, problems = outcome.errors.splitlines(), []
        told = (
            outcome.status == 2
            and len(lines) == 1
            and lines[0].startswith(program)
            and len(lines[0]) <= LONGEST_LINE
        )
        if not told and not (outcome.status == 0 and damage is _flip_bits):
            problems.append(
                f"status {outcome.status}, {len(lines)} lines on standard error: {outcome.errors[-300:]!r}"
            )
        # A run whose weights make it diverge says so after it has begun.
        may_write = (
            ("new", name.split("/")[0])
            if outcome.status == 0
            else ("new",)
            if "the loss is" in outcome.errors
            else ()
        )
        after = _snapshot(folder)
        changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
        problems += [
            f"{path} was written, changed or removed"
            for path in changed
            if path.split("/")[0] not in may_write
        ]
        return [f"{described}: {problem}" for problem in problems]

    def report(self) -> str:
        """The table of counts."""
        lines = [f"{kind:<24}{count:>8}" for kind, count in sorted(self.tried.items())]
        return "\n".join(
            [*lines, f"failures: {len(self.failures)}, in {len({name for name, _ in self.failures})} cases"]
        )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Kill, stop, starve and mislead the programs, and count what they do about it."
    )
    for kind, count in (("kills", 200), ("inputs", 500), ("terms", 50), ("full-disks", 20)):
        parser.add_argument(
            f"--{kind}", type=int, default=count, metavar="N", help="how many (default: %(default)s)"
        )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="CASE", help="one case, such as kill-3 or input-17, as it was printed"
    )
    options = parser.parse_args(argv)
    # Leave no folder behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    prepare()
    synthetic.DEMO_IMAGES = TINY_DEMO
    # How long prediction takes is not what is tried here.
    engine.evaluate.runtime_rows = partial(runtime_rows, seconds=0.1)
    engine.evaluate.measure_blocks = partial(measure_blocks, seconds=0.1)
    engine.evaluate.deadline_rows = partial(deadline_rows, calls=2)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults.") as folder:
        harness = Harness(Path(folder).resolve(), options.seed)
        print(f"seed {options.seed}", flush=True)
        if options.only:
            harness.case(options.only)
        else:
            for kind, wanted in zip(
                KINDS, (options.kills, options.terms, options.full_disks, options.inputs), strict=True
            ):
                number = 0
                harness.wanted[kind] = wanted
                if kind == "input" and wanted > 0:
                    harness.check_consumers()
                while harness.tried[kind] < wanted:
                    harness.case(f"{kind}-{number}")
                    number += 1
                print(f"{kind}: {harness.tried[kind]} in {time.monotonic() - began:.0f} s", flush=True)
        print(harness.report())
        print(f"{math.ceil(time.monotonic() - began)} s")
    return 1 if harness.failures else 0


if __name__ == "__main__":
    sys.exit(main())
