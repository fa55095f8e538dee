"""Damaged and absurd inputs for the programs, made from the files of finished runs.

case = make(17, rng, folder, undisturbed)     # one of KINDS, in turn; everything it may touch lies in ``folder``
outcome = run(case.program, case.argv, case.cwd)
case.problems(outcome, before, snapshot(folder))
"""

import argparse
import hashlib
import io
import os
import pickle
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

import args
import predict
from models import load, to_released
from tests.forked import Outcome

MEMORY = 2**31 + 2**29  # bytes a run may hold at once; PyTorch and a small training need a quarter of it
LONGEST_LINE = 1000

SMALL = ["--nChannels", "4", "--growthRate", "4"]
SETUP = ["--nBlocks", "3", *SMALL, "--batch-size", "32", "--val-size", "64", "--epochs", "1"]
STARTS = ["--batch-size", "32", "--epochs", "1", "--save", "../new"]


class Runs(Protocol):
    """Finished runs to copy: directories."""

    half: Path
    other: Path

    def training(self, name: str) -> Path: ...


@dataclass
class Case:
    """A command whose input is damaged as ``damage`` says. ``may_work`` False: it must be refused.

    Args:
        writes: where a command that works may write, in the case's folder.
        late: it may be refused after the start, and leave a new run behind.
        skipped: predict.py may name up to so many files that it skips, and end with status 1.
    """

    kind: str
    folder: Path
    program: str
    argv: list[str]
    damage: str
    writes: tuple[str, ...] = ("new",)
    may_work: bool = True
    late: bool = False
    skipped: int = 0
    timeout: float = 30.0

    @property
    def cwd(self) -> Path:
        """Where it runs; nothing should appear there."""
        return self.folder / "cwd"

    @property
    def marker(self) -> Path:
        """A file that only code in a pickle would make."""
        return self.folder / "marker"

    def problems(self, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> list[str]:
        """What is wrong with how it ended; ``before`` and ``after`` are snapshots of the folder."""
        found, lines = [], outcome.errors.splitlines()
        if outcome.status == 2 and self.skipped:
            lines = [line for line in lines if not line.endswith("; skipped")]
        if outcome.status is None:
            found.append(f"it hangs: {outcome.seconds:.0f} s")
        elif "Traceback" in outcome.errors:
            found.append(f"a trace, status {outcome.status}: {_traced(lines)}")
        elif outcome.status == 2:
            if len(lines) != 1 or not lines[0].startswith(f"{self.program}".replace("engine.convert", "engine.convert:").split(":")[0]):
                found.append(f"status 2 with {len(lines)} lines on standard error: {outcome.errors[:300]!r}")
            elif len(lines[0]) > LONGEST_LINE:
                found.append(f"a line of {len(lines[0])} characters: {lines[0][:200]!r}")
        elif outcome.status == 1 and self.skipped:
            if not 1 <= len(lines) <= self.skipped or not all(line.endswith("; skipped") for line in lines):
                found.append(f"status 1 with {lines[:5]} for {self.skipped} damaged files")
        elif outcome.status != 0:
            found.append(f"status {outcome.status}: {outcome.errors[-300:]!r}")
        elif not self.may_work:
            found.append("it works, and should be refused")
        if outcome.memory > MEMORY:
            found.append(f"it took {outcome.memory / 2**30:.1f} GiB")
        if self.marker.exists():
            found.append("code in the file has run")
        # A run that diverges says so after it has begun.
        begun = outcome.status == 2 and (self.late or "the loss is" in outcome.errors)
        allowed = self.writes if outcome.status == 0 else ("new",) if begun else ()
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and name.split("/")[0] not in allowed:
                found.append(f"{name} was {'changed' if name in before and name in after else 'removed' if name in before else 'written'}")
        return found


def _traced(lines: list[str]) -> str:
    places = [
        line.strip() for line in lines if line.lstrip().startswith('File "') and "site-packages" not in line and "/lib/python" not in line
    ]
    return f"{lines[-1][:200]} at {places[-1].replace(str(Path(__file__).resolve().parents[1]) + '/', '') if places else '?'}"


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder: digests of files, targets of links, kinds of everything else. The lock of a run does not count."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = str(path.readlink()) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
        if path.name != ".lock":
            found[str(path.relative_to(folder))] = what
    return found


def make(number: int, rng: random.Random, folder: Path, runs: Runs) -> Case:
    """Case ``number``: its kind goes in turn, everything else by chance."""
    (folder / "cwd").mkdir()
    kind = KINDS[number % len(KINDS)]
    case = MAKERS[kind](rng, folder, runs)
    case.kind = kind
    return case


# Networks and runs.


def _consumer(rng: random.Random, folder: Path, runs: Runs) -> tuple[Case, Path]:
    """A command that reads a network or a run, and that file in the case's folder."""
    shutil.copytree(runs.training("GE"), folder / "GE")
    evaluate = ["--evalmode", rng.choice(["anytime", "dynamic", "runtime"])]
    best = "GE/best.safetensors"
    program, argv, name = rng.choice(
        [
            *[("train_GE", ["--save", "../half", "--resume"], "half/last.pt")] * 3,
            ("train_GE", ["--save", "../GE", "--resume"], "GE/last.pt"),
            ("train_GE", ["--save", "../GE", "--resume"], best),
            ("train_GE", ["--save", "../GE", *evaluate], best),
            ("train_GE", ["--evaluate-from", "../released.pth.tar", *evaluate, *SMALL, "--save", "../new"], "released.pth.tar"),
            ("train_IMTA", ["--pretrained", "../released.pth.tar", *STARTS, *SMALL, "--val-size", "64"], "released.pth.tar"),
            ("train_IMTA", ["--pretrained", "../GE", *STARTS], best),
            ("train_IMTA", ["--save", "../IMTA", "--resume"], "IMTA/last.pt"),
            ("predict", ["--checkpoint", f"../{best}", "../good.png"], best),
            ("engine.convert", [f"../{best}", "../new/released.pth.tar"], best),
        ]
    )
    _picture(rng).save(folder / "good.png")
    if name == "released.pth.tar":
        network = load(folder / best)
        torch.save({"epoch": 3, "arch": "msdnet_ge", "state_dict": to_released(network), "best_acc1": 1.0}, folder / name)
    run = name.split("/")[0]
    if run in ("half", "IMTA"):
        shutil.copytree(runs.half if run == "half" else runs.training("IMTA"), folder / run)
    return Case("", folder, program, argv, "", writes=("new", run)), folder / name


def _damaged(damage: Callable[[random.Random, Path], str], may_work: bool = False) -> Callable:
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


def _run_code(rng: random.Random, path: Path) -> str:
    marker = str(next(folder for folder in path.parents if (folder / "cwd").exists()) / "marker")
    calls = [(open, (marker, "w")), (os.system, (f"touch '{marker}'",)), (eval, (f"open({marker!r}, 'w')",)), (os.mkdir, (marker,))]
    call = rng.choice(calls)

    class Payload:
        def __reduce__(self) -> tuple:
            return call

    form = rng.choice(["pickle", "torch", "old torch", "field"])
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=rng.randrange(5)))
    elif form == "field" and path.suffix != ".safetensors":
        state = torch.load(path, weights_only=True)
        torch.save({**state, rng.choice([*state]): rng.choice([Payload(), [Payload()], {"x": Payload()}])}, path)
    else:
        content = rng.choice([Payload(), {"state_dict": Payload()}])
        torch.save(content, path, _use_new_zipfile_serialization=form != "old torch")
    return f"{form} that calls {call[0].__name__}"


def _other_version(rng: random.Random, path: Path) -> str:
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes().replace(b"imta-msdnet network 2", b"imta-msdnet network 3"))
    else:
        torch.save({**torch.load(path, weights_only=True), "format": "imta-msdnet run 3"}, path)
    return "another version"


def _swapped(rng: random.Random, folder: Path, runs: Runs) -> Case:
    for name, path in (("GE", runs.training("GE")), ("IMTA", runs.training("IMTA")), ("half", runs.half), ("other", runs.other)):
        shutil.copytree(path, folder / name)
    _picture(rng).save(folder / "good.png")
    other_file = rng.choice(["GE/log.jsonl", "GE/policy.json", "GE/last.pt", "GE", "nowhere.pt", "good.png", "cwd/x\ny.pt"])
    evaluate = ["--evalmode", rng.choice(["anytime", "dynamic"])]
    best = "best.safetensors"
    # file to replace, file to put there, program, arguments
    replaced, by, program, argv = rng.choice(
        [
            ("GE/last.pt", "IMTA/last.pt", "train_GE", ["--save", "../GE", "--resume"]),
            ("GE/last.pt", f"GE/{best}", "train_GE", ["--save", "../GE", "--resume"]),
            (f"GE/{best}", f"other/{best}", "train_GE", ["--save", "../GE", "--resume"]),
            (f"half/{best}", f"IMTA/{best}", "train_IMTA", ["--save", "../half", "--resume"]),
            ("half/last.pt", "other/last.pt", "train_GE", ["--save", "../half", "--resume", "--nBlocks", "3"]),
            ("GE/policy.json", "IMTA/policy.json", "train_GE", ["--save", "../GE", "--evalmode", "runtime"]),
            ("", "", "predict", ["--checkpoint", f"../IMTA/{best}", "--policy", "../GE/policy.json", "../good.png"]),
            ("", "", "predict", ["--checkpoint", f"../{other_file}", "../good.png"]),
            ("", "", "engine.convert", [f"../{other_file}", "../new/released.pth.tar"]),
            ("", "", "train_IMTA", ["--pretrained", "../IMTA", *STARTS]),
            ("", "", "train_IMTA", ["--pretrained", "../other", "--nBlocks", "3", *STARTS]),
            ("", "", "train_IMTA", ["--pretrained", "../GE/log.jsonl", *STARTS]),
            ("", "", "train_GE", ["--evaluate-from", f"../other/{best}", "--save", "../GE", *evaluate]),
            ("", "", "train_GE", ["--evaluate-from", f"../{other_file}", "--save", "../new", *evaluate]),
            ("", "", "train_IMTA", ["--save", "../GE", "--resume"]),
            ("", "", "train_GE", ["--save", "../GE", *SETUP]),
        ]
    )
    if replaced:
        shutil.copyfile(folder / by, folder / replaced)
    return Case("", folder, program, argv, f"{by} as {replaced}" if replaced else "another file", may_work=False)


# Images, flags, tables and records.


def _picture(rng: random.Random, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def _broken_image(rng: random.Random, folder: Path, stem: str) -> str:
    """Make one in ``folder``; some of them can be read all the same."""
    form, suffix = rng.choice([("PNG", ".png"), ("JPEG", ".jpg"), ("TIFF", ".tif"), ("WEBP", ".webp")])
    stream, path = io.BytesIO(), folder / f"{stem}{suffix}"
    _picture(rng, rng.choice([(32, 32), (200, 150), (1, 1), (1, 5000)])).save(stream, form)
    path.write_bytes(stream.getvalue())
    choice = rng.choice(["cut", "flipped", "noise", "whole", "directory", "link", "pipe"])
    if choice in ("cut", "flipped", "noise"):
        return {"cut": _truncate, "flipped": _flip_bits, "noise": _noise}[choice](rng, path)
    if choice != "whole":
        path.unlink()
        {"directory": path.mkdir, "link": lambda: path.symlink_to(path.name), "pipe": lambda: os.mkfifo(path)}[choice]()
    return choice


def _images_to_predict(rng: random.Random, folder: Path, runs: Runs) -> Case:
    shutil.copytree(runs.training("GE"), folder / "GE")
    images = folder / "images"
    images.mkdir()
    _picture(rng).save(images / "a.png")
    count = rng.randrange(1, 4)
    damage = [_broken_image(rng, images, f"b{i}") for i in range(count)]
    named = ["../images"] if rng.random() < 0.5 else [f"../images/{path.name}" for path in sorted(images.iterdir())]
    argv = ["--checkpoint", "../GE/best.safetensors", "--batch-size", rng.choice(["1", "64"]), *named]
    return Case("", folder, "predict", argv, ", ".join(damage), writes=(), skipped=count)


def _images_to_train_on(rng: random.Random, folder: Path, runs: Runs) -> Case:
    images = folder / "images"
    for part, count in (("train", 20), ("test", 4)):
        for name in ("ant", "bee"):
            (images / part / name).mkdir(parents=True)
            for i in range(count):
                _picture(rng).save(images / part / name / f"{i}.png")
    where = images / rng.choice(["train", "test"]) / "ant"
    if rng.random() < 0.8:
        damage = _broken_image(rng, where, "0x")
    else:
        damage = "missing"
        shutil.rmtree(rng.choice([where, where.parent]))
    large = ["--image-size", "72", "--no-small-inputs", "--workers", rng.choice(["0", "2"])]
    size = rng.choice([["--image-size", "32"], large])
    argv = [*SETUP, "--data", "folder", "--data-root", "../images", "--val-size", "8", "--batch-size", "8", *size, "--save", "../new"]
    return Case("", folder, "train_GE", argv, f"{where.relative_to(folder)}: {damage}", late=size is large)


WORDS = [
    *(
        "",
        "0",
        "-1",
        "1",
        "2",
        "64",
        "1e400",
        "nan",
        "-inf",
        "0.5",
        "1e-320",
        str(2**63),
        "9" * 5000,
        "x",
        "\udcff",
        "two\nlines",
        "\x1b[2J",
    ),
    *("1-2-4", "0-0", ",", "%s", "--lr", "None", "\u0663", "x" * 300, "../nowhere/at/all", "../GE/best.safetensors", "../GE", "/"),
]
# The cases choose where to write themselves; to compile takes minutes.
UNTRIED = ("help", "save", "output", "compile")
# An epoch takes its time, and so many processes take the machine's; to ask for them is no mistake.
MODEST = {"--epochs": ("0", "-1", "1", "nan", "x", ""), "--workers": ("0", "-1", "1", "nan", "x", "")}


def _random_flags(rng: random.Random, parser: argparse.ArgumentParser, count: int) -> list[str]:
    actions = [action for action in parser._actions if action.option_strings and action.dest not in UNTRIED]
    words: list[str] = []
    for action in rng.sample(actions, count):
        words.append(rng.choice(action.option_strings))
        if action.nargs != 0 and (action.nargs != "?" or rng.random() < 0.5):
            words.append(rng.choice([*(action.choices or ["1", "3", "0.5", "1-2-4"]), *MODEST.get(action.option_strings[0], WORDS)]))
    return words


def _flags(rng: random.Random, folder: Path, runs: Runs) -> Case:
    shutil.copytree(runs.training("GE"), folder / "GE")
    _picture(rng).save(folder / "good.png")
    program = rng.choice(["train_GE", "train_IMTA", "predict"])
    if program == "predict":
        output = rng.choice([[], ["--output", rng.choice(["../new/answers.csv", "../GE", "../" + "x" * 300, ""])]])
        argv = [
            "--checkpoint",
            "../GE/best.safetensors",
            "../good.png",
            *_random_flags(rng, predict._build_parser(), rng.choice([0, 1, 3])),
        ]
        return Case("", folder, program, [*argv, *output], "flags", skipped=3)
    target = rng.choice(["../new"] * 6 + ["../GE", "../GE/best.safetensors", "../" + "x" * 300, "../\udcff", "../two\nlines"])
    start = SETUP if program == "train_GE" else ["--pretrained", "../GE", "--epochs", "1", "--batch-size", "32"]
    argv = [*start, "--save", target, *_random_flags(rng, args.build_parser(program[6:]), rng.choice([1, 1, 2, 6]))]
    # What --overwrite and --resume are for.
    return Case("", folder, program, argv, "flags", writes=("new", target.removeprefix("../").split("/")[0]))


def _records(rng: random.Random, folder: Path, runs: Runs) -> Case:
    """Policy, tables, log and record of a run that goes on, is evaluated or predicts."""
    name = rng.choice(["policy.json", "policy.json", "anytime.csv", "budgeted.csv", "log.jsonl", "run.json"])
    shutil.copytree(runs.training("GE"), folder / "GE")
    _picture(rng).save(folder / "good.png")
    damage = rng.choice([_truncate, _flip_bits, _noise])(rng, folder / "GE" / name)
    predicts = ("predict", ["--checkpoint", "../GE/best.safetensors", "../good.png"])
    evaluates = ("train_GE", ["--save", "../GE", "--evalmode", rng.choice(["anytime", "dynamic", "runtime"])])
    program, argv = rng.choice([predicts, evaluates, ("train_GE", ["--save", "../GE", "--resume"])])
    return Case("", folder, program, argv, f"{name}: {damage}", writes=("GE",), late=True)


MAKERS: dict[str, Callable[[random.Random, Path, Runs], Case]] = {
    "truncated": _damaged(_truncate),
    "flipped": _damaged(_flip_bits, may_work=True),
    "noise": _damaged(_noise),
    "code": _damaged(_run_code),
    "version": _damaged(_other_version, may_work=True),
    "swapped": _swapped,
    "images to predict": _images_to_predict,
    "images to train on": _images_to_train_on,
    "flags": _flags,
    "records": _records,
}
# What fails in more ways comes more often.
KINDS = [*MAKERS, "flags", "flags", "code", "images to train on"]
