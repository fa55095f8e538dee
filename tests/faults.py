"""Kill, stop, starve and mislead the programs, and count what they do about it.

    python tests/faults.py --kills 200 --inputs 500 --terms 50 --full-disks 20 --seed 0
    python tests/faults.py --only input-17 --seed 0        # one case again

kill: SIGKILL at random instants of short trainings of both stages; after each one every file is whole or absent, and ``--resume`` ends
with the weights, the optimiser, the log and the tables of an undisturbed run, bit for bit. term: the same with SIGTERM and SIGINT, which
must end with status 143 or 130 and one line that names ``--resume``. disk: the same with a disk that is full at a random point: one line,
status 2. input: damaged or absurd files and flags (``tests/fault_inputs.py``): one line and status 2, or work; nothing overwritten.

The exit status is 1 if anything failed. ``--self-check`` then breaks the programs on purpose and fails unless that is noticed.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import datasets
import engine.checkpoint
import engine.evaluate
from adaptive_inference.timing import deadline_rows, measure_blocks, runtime_rows
from engine.log import Log
from tests import fault_inputs
from tests.compare import differences, unreadable
from tests.conftest import TINY_DEMO, TINY_FLAGS
from tests.forked import Outcome, prepare, run

KINDS = ("kill", "term", "disk", "input")
# What --amp auto chooses depends on how busy the machine is.
LINKS = ["--epochs", "2", "--batch-size", "32", "--amp", "off"]
TRAININGS = {
    "GE": ("train_GE", [*TINY_FLAGS, "--epochs", "2", "--augment", "standard", "--clip-grad", "5", "--warmup-epochs", "0.5"]),
    "IMTA": ("train_IMTA", LINKS),
    "IMTA moving": ("train_IMTA", [*LINKS, "--backbone-bn", "moving", "--released"]),
}
MOST_LEFTOVERS = 1  # temporary files of one killed run; the next one clears them away


class Undisturbed:
    """Finished runs to compare with, to copy and to damage; each is made when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[str, float] = {}

    def training(self, name: str) -> Path:
        """Directory of the finished training ``name`` of ``TRAININGS``."""
        path = self.folder / name.replace(" ", "_")
        if not path.exists():
            program, flags = TRAININGS[name]
            outcome = run(program, [*flags, *self.origin(name), "--save", str(path)], self.folder)
            _must_work(outcome, name)
            self.seconds[name] = outcome.seconds
        return path

    def origin(self, name: str) -> list[str]:
        """The flag that names stage 1, for stage 2."""
        return [] if name == "GE" else ["--pretrained", str(self.training("GE"))]

    @cached_property
    def half(self) -> Path:
        """A stage-1 run that was stopped in the middle of its second epoch."""
        path = self.folder / "half"
        program, flags = TRAININGS["GE"]
        with mock.patch.object(Log, "advance", partialmethod(_advance_six_steps, Log.advance, itertools.count(1))):
            outcome = run(program, [*flags, "--save", str(path)], self.folder)
        if outcome.status != 143:
            raise SystemExit(f"a run stopped in its sixth step ended with {outcome.status}: {outcome.errors}")
        return path

    @cached_property
    def other(self) -> Path:
        """A stage-1 run of another network."""
        path = self.folder / "other"
        _must_work(run("train_GE", [*TINY_FLAGS, "--nBlocks", "2", "--save", str(path)], self.folder), "other")
        return path


def _send(number: signal.Signals, child: int) -> None:
    # A terminal sends Ctrl-C to a whole group of processes; nobody else does.
    (os.kill if number == signal.SIGTERM else os.killpg)(child, number)


def _must_work(outcome: Outcome, name: str) -> None:
    if outcome.status != 0:
        raise SystemExit(f"the undisturbed run {name} ended with {outcome.status}: {outcome.errors}")


def _advance_six_steps(log: Log, real: Callable[[Log], None], steps: Iterator[int]) -> None:
    real(log)
    if next(steps) == 6:
        signal.raise_signal(signal.SIGTERM)


class Harness:
    """Runs cases and counts: ``tried`` (what was done), ``ended`` (how runs ended), ``failures`` (case and reason).

    When so many of a kind were tried as are ``wanted``, what is under way comes to its end undisturbed.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.wanted: dict[str, int] = {}
        (folder / "undisturbed").mkdir()
        self.undisturbed = Undisturbed(folder / "undisturbed")
        self.tried: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.failures: list[tuple[str, str]] = []
        self.most_leftovers = 0
        self.instants: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}  # tenths of an undisturbed run

    def case(self, name: str) -> None:
        """Do the case ``name``: a kind and a number; both and the seed decide about everything random in it."""
        kind, number = name.rsplit("-", 1)
        folder = self.folder / name
        folder.mkdir()
        try:
            attempt = {"disk": self._disk, "input": self._input}.get(kind, partial(self._interrupted_again_and_again, kind))
            problems = attempt(random.Random(f"{self.seed} {name}"), folder, int(number))
        except Exception as error:  # one case must not lose the others' results
            traceback.print_exc()
            problems = [f"the harness itself: {type(error).__name__}: {error}"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for problem in problems:
            problem = problem.encode("ascii", "backslashreplace").decode()
            self.failures.append((name, problem))
            print(f"FAILED {name} (seed {self.seed}): {problem}", flush=True)

    def _count(self, kind: str, outcome: Outcome) -> None:
        status = outcome.status
        self.ended[kind, "hangs" if status is None else f"status {status}" if status >= 0 else f"signal {-status}"] += 1

    def _training(self, rng: random.Random, number: int) -> tuple[str, str, list[str], Path]:
        # Stage 1 moves all weights, so it gets more than its share.
        name = ("GE", "GE", "IMTA", "GE", "IMTA moving")[number % 5]
        wanted, (program, flags) = self.undisturbed.training(name), TRAININGS[name]
        often = rng.choice([["--save-every-steps", "1"], ["--save-every-steps", "1"], ["--save-every-steps", "3"], []])
        return name, program, [*flags, *self.undisturbed.origin(name), *often], wanted

    def _interrupted_again_and_again(self, kind: str, rng: random.Random, folder: Path, number: int) -> list[str]:
        """One training, interrupted at random instants and resumed until it comes to its end."""
        name, program, flags, wanted = self._training(rng, number)
        problems, path = [], folder / "run"
        resume: list[str] = []
        for attempt in range(50):
            number = signal.SIGKILL if kind == "kill" else rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
            # Later and later, for the day that the machine is slower than when it was left undisturbed.
            instant = rng.random() * self.undisturbed.seconds[name] * (1 + attempt / 10)
            strike = partial(_send, number) if self.tried[kind] < self.wanted.get(kind, math.inf) else None
            outcome = run(program, [*flags, *resume, "--save", str(path)], folder, strike, instant)
            where = f"{name} after {instant:.3f} s {' '.join(resume)}"
            self._count(kind, outcome)
            if outcome.status == 0:
                break
            self.tried[kind] += outcome.struck
            self.instants[kind][min(9, int(10 * instant / self.undisturbed.seconds[name]))] += outcome.struck
            problems += [f"{where}: {problem}" for problem in self._wrong_end(kind, outcome, number)]
            damage, leftovers = unreadable(path)
            problems += [f"{where}: {problem}" for problem in damage]
            self.most_leftovers = max(self.most_leftovers, leftovers)
            if leftovers > (MOST_LEFTOVERS if kind == "kill" else 0):
                problems.append(f"{where}: {leftovers} temporary files have piled up")
            if outcome.status == 2 or outcome.status is None:  # it does not go on
                return problems
            resume = ["--resume"]
        else:
            return [*problems, "50 resumptions did not bring it to its end"]
        damage, leftovers = unreadable(path)
        problems += damage + [f"{leftovers} temporary files are left at the end"] * (leftovers > 0)
        return problems + [f"{name}: unlike the undisturbed run: {what}" for what in differences(path, wanted)]

    def _wrong_end(self, kind: str, outcome: Outcome, number: int) -> list[str]:
        if outcome.status is None:
            return ["it hangs"]
        if kind == "kill":
            was_killed = outcome.status == -signal.SIGKILL
            return [] if was_killed else [f"status {outcome.status} before the kill: {outcome.errors.strip()[-300:]}"]
        lines = outcome.errors.splitlines()
        if outcome.status == 128 + number and len(lines) == 1 and "--resume" in lines[0]:
            return []
        return [f"signal {number}: status {outcome.status}, {len(lines)} lines on standard error: {lines[-1:]}"]

    def _disk(self, rng: random.Random, folder: Path, number: int) -> list[str]:
        """A disk too small from the start, or one that something else fills in the middle; then there is space, and the run goes on."""
        name, program, flags, wanted = self._training(rng, number)
        need = sum(file.stat().st_size for file in wanted.iterdir()) + (wanted / "last.pt").stat().st_size
        size, instant = rng.randrange(need), rng.random() * self.undisturbed.seconds[name]
        with small_disk(folder / "disk") as disk:
            path, limits, filler = folder / "disk" / "run", {}, folder / "disk" / "filler"
            if disk is None:
                limits = {"file_size": max(2**16, size // 2)}
            elif rng.random() < 0.5:
                disk(size)
            else:
                disk(2 * need)
                limits = {"strike": lambda child: fill(filler), "after": instant}
            outcome = run(program, [*flags, "--save", str(path)], folder, **limits)
            self._count("disk", outcome)
            where = f"{name}, " + (f"filled after {instant:.3f} s" if "strike" in limits else f"{size} bytes")
            problems = []
            if outcome.status != 0:
                self.tried["disk"] += 1
                lines = outcome.errors.splitlines()
                if outcome.status != 2 or len(lines) != 1:
                    problems.append(f"{where}: status {outcome.status}, {len(lines)} lines on standard error: {lines[-1:]}")
            damage, leftovers = unreadable(path)
            problems += [f"{where}: {problem}" for problem in damage + [f"{leftovers} temporary files"] * (leftovers > 0)]
            filler.unlink(missing_ok=True)
            if disk is not None:
                disk(4 * need)
            outcome = run(program, [*flags, "--resume", "--save", str(path)], folder)
            if outcome.status != 0:
                return [*problems, f"{where}: resumed with space, it ends with {outcome.status}: {outcome.errors.strip()[-300:]}"]
            return problems + [f"{where}: unlike the undisturbed run: {what}" for what in differences(path, wanted)]

    def _input(self, rng: random.Random, folder: Path, number: int) -> list[str]:
        case = fault_inputs.make(number, rng, folder, self.undisturbed)
        self.tried["input"] += 1
        self.tried[f"input: {case.kind}"] += 1
        before = fault_inputs.snapshot(folder)
        outcome = run(case.program, case.argv, case.cwd, timeout=30)
        self._count("input", outcome)
        described = " ".join(word if len(word) < 200 else word[:100] + "..." for word in [case.program, *case.argv]).replace(
            str(folder), ""
        )
        return [
            f"{case.kind}: {problem} [{described}; {case.damage}]"
            for problem in case.problems(outcome, before, fault_inputs.snapshot(folder))
        ]

    def report(self) -> str:
        """The table of counts."""
        lines = [f"{'what':<24}{'tried':>8}   how runs ended"]
        for kind in KINDS:
            ends = ", ".join(f"{end}: {count}" for (k, end), count in sorted(self.ended.items()) if k == kind)
            if self.tried[kind]:
                lines.append(f"{kind:<24}{self.tried[kind]:>8}   {ends}")
        lines += [f"{kind:<24}{count:>8}" for kind, count in sorted(self.tried.items()) if kind not in KINDS]
        for kind in ("kill", "term"):
            tenths = " ".join(str(self.instants[kind][i]) for i in range(10))
            lines += [f"{kind} by tenths of the time of an undisturbed run: {tenths}"] * (self.tried[kind] > 0)
        lines.append(f"temporary files after a SIGKILL: at most {self.most_leftovers}")
        lines.append(f"failures: {len(self.failures)}, in {len({name for name, _ in self.failures})} cases")
        return "\n".join(lines)


@contextmanager
def small_disk(path: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system of its own at ``path``; gives a function that sets its size in bytes, or None where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True).returncode == 0

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={max(size // 1024, 8)}k", str(path)], check=True)

    try:
        yield resize if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    """Write until there is no space."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            for block in (2**20, 2**12):
                while stream.write(bytes(block)) == block:
                    pass


# One kill may come before anything is saved, or after the end.
KILLS_TO_NOTICE = [f"kill-{i}" for i in range(12)]


# Ways to break the programs, each with the cases that must notice it.
@contextmanager
def _write_in_place(path: Path, mode: str = "w", *verification: Any) -> Iterator[Any]:
    with path.open(mode) as stream:
        stream.write(b"half of it")
        stream.flush()
        time.sleep(0.15)
        stream.seek(0)
        yield stream


MUTANTS = {
    "a resumed run forgets the momentum": (
        [(torch.optim.SGD, "load_state_dict", lambda optimizer, state: None)],
        KILLS_TO_NOTICE,
    ),
    "checkpoints are written in place": ([(engine.checkpoint, "atomic_write", _write_in_place)], KILLS_TO_NOTICE),
    "pickles run code": (
        [(torch, "load", lambda *args, real=torch.load, **options: real(*args, **{**options, "weights_only": False}))],
        [f"input-{fault_inputs.KINDS.index('code') + i * len(fault_inputs.KINDS)}" for i in range(8)],
    ),
}


def self_check(harness: Harness) -> int:
    """Break the programs, one way after the other; returns how often nothing was noticed. What the harness has counted is lost."""
    missed = 0
    # The runs to compare with must be made by programs that work.
    for name in ("GE", "IMTA"):
        harness.undisturbed.training(name)
    _ = harness.undisturbed.half
    for name, (patches, cases) in MUTANTS.items():
        harness.failures.clear()
        with contextlib.ExitStack() as stack:
            for target, attribute, replacement in patches:
                stack.enter_context(mock.patch.object(target, attribute, replacement))
            for case in cases:
                harness.wanted = {"kill": harness.tried["kill"] + 2}
                harness.case(case)
                if harness.failures:
                    break
        print(f"{name}: {'noticed' if harness.failures else 'NOT NOTICED'}", flush=True)
        missed += not harness.failures
    return missed


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill, stop, starve and mislead the programs, and count what they do about it.")
    for kind, count in (("kills", 200), ("inputs", 500), ("terms", 50), ("full-disks", 20)):
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")
    parser.add_argument("--only", metavar="CASE", help="one case, such as kill-3 or input-17, as it was printed")
    parser.add_argument("--self-check", action="store_true", help="then break the programs on purpose, and see that it is noticed")
    options = parser.parse_args(argv)
    # Leave no file system mounted and no folder behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    prepare()
    datasets.DEMO_IMAGES = TINY_DEMO
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
            for kind, wanted in zip(KINDS, (options.kills, options.terms, options.full_disks, options.inputs), strict=True):
                number = 0
                harness.wanted[kind] = wanted
                while harness.tried[kind] < wanted:
                    harness.case(f"{kind}-{number}")
                    number += 1
                    if number > 10 * wanted:
                        harness.failures.append((kind, f"{number} cases, but only {harness.tried[kind]} were hit"))
                        break
                print(f"{kind}: {harness.tried[kind]} in {time.monotonic() - began:.0f} s", flush=True)
        print(harness.report())
        for name, problem in harness.failures:
            print(f"--only {name} --seed {options.seed}: {problem}")
        failed = bool(harness.failures)
        if options.self_check:
            print("\nThe programs are broken on purpose now; what follows should fail.")
            failed |= self_check(harness) > 0
        print(f"{math.ceil(time.monotonic() - began)} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
