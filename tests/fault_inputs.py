"""Damaged files for the programs, made from those of finished runs.

case = make(17, rng, folder, runs)     # one of KINDS, in turn; everything it may touch lies in ``folder``
outcome = run(case.program, case.argv, case.cwd)
case.problems(outcome, before, snapshot(folder))
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from models import load, to_released
from tests.forked import Outcome

LONGEST_LINE = 1000

SMALL = ["--nChannels", "4", "--growthRate", "4"]
STARTS = ["--batch-size", "32", "--epochs", "1", "--save", "../new"]


Runs = Callable[[str], Path]  # GE or IMTA -> the directory of a finished run, to copy
Damage = Callable[[random.Random, Path], str]  # of a file, in words


@dataclass
class Case:
    """A command whose input is damaged as ``damage`` says. ``may_work`` False: it must be refused. ``writes`` is where a command that works
    may write, in the case's folder."""

    folder: Path
    program: str
    argv: list[str]
    damage: str
    writes: tuple[str, ...] = ("new",)
    may_work: bool = True
    kind: str = ""

    @property
    def cwd(self) -> Path:
        """Where it runs; nothing should appear there."""
        return self.folder / "cwd"

    def problems(self, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
        """What is wrong with how it ended; ``before`` and ``after`` are snapshots of the folder."""
        found, lines = [], outcome.errors.splitlines()
        is_told = len(lines) == 1 and lines[0].startswith(self.program) and len(lines[0]) <= LONGEST_LINE
        if outcome.status not in (0, 2) or (outcome.status == 2 and not is_told) or "Traceback" in outcome.errors:
            found.append(f"status {outcome.status} (None: it hangs), {len(lines)} lines on standard error: {outcome.errors[-300:]!r}")
        elif outcome.status == 0 and not self.may_work:
            found.append("it works, and should be refused")
        # A run that diverges says so after it has begun.
        begun = outcome.status == 2 and "the loss is" in outcome.errors
        allowed = self.writes if outcome.status == 0 else ("new",) if begun else ()
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and name.split("/")[0] not in allowed:
                found.append(f"{name} was written, changed or removed")
        return found


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder: digests of files, and other names. The lock of a run does not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def make(number: int, rng: random.Random, folder: Path, runs: Runs) -> Case:
    """Case ``number``: its kind goes in turn, everything else by chance."""
    (folder / "cwd").mkdir()
    kind = KINDS[number % len(KINDS)]
    return replace(MAKERS[kind](rng, folder, runs), kind=kind)


def _consumer(rng: random.Random, folder: Path, runs: Runs) -> tuple[Case, Path]:
    """A command that reads a network or a run, and that file in the case's folder."""
    for name in ("GE", "IMTA"):
        shutil.copytree(runs(name), folder / name)
    _picture(rng).save(folder / "good.png")
    best, released = "GE/best.safetensors", "released.pth.tar"
    torch.save({"arch": "msdnet_ge", "state_dict": to_released(load(folder / best))}, folder / released)
    evaluate = ["--evalmode", rng.choice(["anytime", "dynamic", "runtime"])]
    program, argv, name = rng.choice(
        [
            *[("train_GE", ["--save", "../GE", "--resume"], "GE/last.pt")] * 3,
            ("train_GE", ["--save", "../GE", "--resume"], best),
            ("train_GE", ["--save", "../GE", *evaluate], best),
            ("train_GE", ["--evaluate-from", f"../{released}", *evaluate, *SMALL, "--save", "../new"], released),
            ("train_IMTA", ["--pretrained", f"../{released}", *STARTS, *SMALL, "--val-size", "64"], released),
            ("train_IMTA", ["--pretrained", "../GE", *STARTS], best),
            ("train_IMTA", ["--save", "../IMTA", "--resume"], "IMTA/last.pt"),
            ("predict", ["--model", f"../{best}", "../good.png"], best),
            ("predict", ["--model", f"../{best}", "../good.png"], "GE/policy.json"),
            ("train_GE", ["--save", "../GE", "--evalmode", "runtime"], "GE/policy.json"),
        ]
    )
    return Case(folder, program, argv, "", writes=("new", name.split("/")[0])), folder / name


def _damaged(damage: Damage, may_work: bool = False) -> Callable:
    def make_case(rng: random.Random, folder: Path, runs: Runs) -> Case:
        case, path = _consumer(rng, folder, runs)
        case.damage, case.may_work = f"{path.name}: {damage(rng, path)}", may_work
        return case

    return make_case


def _truncate(rng: random.Random, path: Path) -> str:
    size = path.stat().st_size
    kept = rng.choice([rng.randrange(size), rng.randrange(min(size, 1000)), max(size - 1 - rng.randrange(200), 0)])
    os.truncate(path, kept)
    return f"cut to {kept} of {size} bytes"


def _flip_bits(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 2, 20]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bits flipped at {places}"


def _noise(rng: random.Random, path: Path) -> str:
    start = rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"{", b"\x00" * 64, b"[" * 100_000])
    path.write_bytes(start + rng.randbytes(rng.choice([0, 1, 100, 10_000, 1_000_000])))
    return f"noise after {start[:8]!r}"


def _picture(rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3))


MAKERS: dict[str, Callable[[random.Random, Path, Runs], Case]] = {
    "truncated": _damaged(_truncate),
    "flipped": _damaged(_flip_bits, may_work=True),
    "noise": _damaged(_noise),
}
KINDS = list(MAKERS)
