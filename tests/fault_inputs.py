"""Damaged and absurd inputs for the programs, made from the files of finished runs.

case = make(17, rng, folder, undisturbed)     # one of KINDS, in turn; everything it may touch lies in ``folder``
outcome = run(case.program, case.argv, case.cwd)
case.problems(outcome, before, snapshot(folder))
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import pickletools
import random
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

import args
import predict
from engine.checkpoint import build_network
from models import to_released
from tests.forked import Outcome

MEMORY = 2**31 + 2**29  # bytes a run may hold at once; PyTorch and a small training need a quarter of it
LONGEST_LINE = 1000

SETUP = [*("--nBlocks", "3", "--nChannels", "4", "--growthRate", "4"), *("--batch-size", "32", "--val-size", "64", "--epochs", "1")]
RESUME_HALF = ("train_GE", ["--save", "../half", "--resume"], "half/last.pt")
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
    pipes: list[Path] = field(default_factory=list)

    @property
    def cwd(self) -> Path:
        """Where it runs; nothing should appear there."""
        return self.folder / "cwd"

    @property
    def marker(self) -> Path:
        """A file that only code in a pickle would make."""
        return self.folder / "marker"

    @contextmanager
    def open_pipes(self) -> Iterator[None]:
        """Someone listens at the pipes, so that writing into one would not wait."""
        handles = [os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in self.pipes]
        try:
            yield
        finally:
            for handle in handles:
                os.close(handle)

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
            if not 1 <= sum(line.endswith("; skipped") for line in lines) <= self.skipped:
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


# Checkpoints.


def _consumer(rng: random.Random, folder: Path, runs: Runs) -> tuple[Case, Path]:
    """A command that reads a checkpoint, and that checkpoint in the case's folder."""
    shutil.copytree(runs.training("GE"), folder / "GE")
    modes = [["--evalmode", mode] for mode in ("anytime", "dynamic", "runtime")]
    program, argv, name = rng.choice(
        [
            *[RESUME_HALF] * 3,
            ("train_GE", ["--save", "../GE", "--resume"], "GE/last.pt"),
            ("train_GE", ["--save", "../GE", "--resume"], "GE/best.pt"),
            ("train_GE", ["--save", "../GE", *rng.choice(modes)], "GE/best.pt"),
            ("train_GE", ["--evaluate-from", "../GE/last.pt", "--save", "../new", *modes[0]], "GE/last.pt"),
            ("train_IMTA", ["--pretrained", "../GE", *STARTS], "GE/best.pt"),
            ("train_IMTA", ["--save", "../IMTA", "--resume"], "IMTA/last.pt"),
            ("train_IMTA", ["--save", "../IMTA", *rng.choice(modes)], "IMTA/best.pt"),
            ("predict", ["--checkpoint", "../GE/best.pt", "../good.png"], "GE/best.pt"),
            ("engine.convert", ["../GE/best.pt", "../new/released.pth.tar"], "GE/best.pt"),
        ]
    )
    if program == "predict":
        _picture(rng).save(folder / "good.png")
    run = name.split("/")[0]
    if run != "GE":
        shutil.copytree(runs.half if run == "half" else runs.training("IMTA"), folder / run)
    return Case("", folder, program, argv, "", writes=("new", run)), folder / name


def _bytes_damaged(damage: Callable[[random.Random, Path], str], may_work: bool = False) -> Callable:
    def make_case(rng: random.Random, folder: Path, runs: Runs) -> Case:
        case, path = _consumer(rng, folder, runs)
        case.damage, case.may_work = damage(rng, path), may_work
        return case

    return make_case


def _truncate(rng: random.Random, path: Path) -> str:
    size = path.stat().st_size
    kept = rng.choice([rng.randrange(size), rng.randrange(1000), size - 1 - rng.randrange(200)])
    os.truncate(path, kept)
    return f"cut to {kept} of {size} bytes"


def _flip_bits(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 2, 20]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bits flipped at {places}"


def _empty(rng: random.Random, path: Path) -> str:
    path.write_bytes(b"")
    return "empty"


def _noise(rng: random.Random, path: Path) -> str:
    start = rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x93NUMPY", b"{", b"\x00" * 64])
    path.write_bytes(start + rng.randbytes(rng.choice([1, 100, 10_000, 1_000_000])))
    return f"noise after {start[:8]!r}"


def _run_code(rng: random.Random, path: Path) -> str:
    marker = str(path.parents[1] / "marker")
    calls = [(open, (marker, "w")), (os.system, (f"touch '{marker}'",)), (eval, (f"open({marker!r}, 'w')",)), (os.mkdir, (marker,))]
    call = rng.choice(calls)

    class Payload:
        def __reduce__(self) -> tuple:
            return call

    form = rng.choice(["pickle", "torch", "old torch", "field", "field"])
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=rng.randrange(5)))
    elif form == "field":
        state = torch.load(path, weights_only=True)
        state[rng.choice([*state])] = rng.choice([Payload(), [Payload()], {"x": Payload()}])
        torch.save(state, path)
    else:
        content = rng.choice([Payload(), {"state_dict": Payload()}])
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    return f"{form} that calls {call[0].__name__}"


def _absurd_sizes(rng: random.Random, path: Path) -> str:
    state = torch.load(path, weights_only=True)
    form = rng.choice(["claimed shape", "held out", "integers", "integers", "record size", "bomb"])
    if form == "claimed shape":
        name = rng.choice([*state["state_dict"]])
        state["state_dict"][name] = torch.zeros(1).expand(10**6, 10**6)
    elif form == "held out":
        state["held_out"] = torch.zeros(1, dtype=torch.int64).expand(10**12)
    torch.save(state, path)
    if form == "integers":
        _rewrite_pickle(path, lambda program: _other_integers(rng, program))
    elif form == "bomb":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(f"{archive.namelist()[0].split('/')[0]}/data/bomb", bytes(2**28))
    elif form == "record size":
        # The central directory, at the end, says how large every record is.
        content = bytearray(path.read_bytes())
        places = list(_positions(content, b"PK\x01\x02"))
        struct.pack_into("<I", content, rng.choice(places) + 24, rng.choice([2**32 - 2, 2**31, 0]))
        path.write_bytes(content)
    return form


def _positions(content: bytes, pattern: bytes) -> Iterator[int]:
    place = content.find(pattern)
    while place >= 0:
        yield place
        place = content.find(pattern, place + 1)


def _rewrite_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def _other_integers(rng: random.Random, program: bytes) -> bytes:
    """Replace a few of a pickle's numbers: shapes, strides, sizes, epochs."""
    numbers = [(at, arg) for op, arg, at in pickletools.genops(program) if op.name in ("BININT1", "BININT2", "BININT")]
    widths = {b"K": 2, b"M": 3, b"J": 5}
    for at, _ in sorted(rng.sample(numbers, rng.choice([1, 1, 3, 30])), reverse=True):
        wide = rng.choice([2**40, 2**62, 10**30])
        other = rng.choice([b"K\x00", struct.pack("<ci", b"J", -1), struct.pack("<ci", b"J", 2**31 - 1), pickle.dumps(wide, 2)[2:-1]])
        program = program[:at] + other + program[at + widths[program[at : at + 1]] :]
    return program


def _nested(rng: random.Random, path: Path) -> str:
    depth = rng.choice([1000, 10_000, 100_000])
    deep = rng.choice([b"]" * depth + b"a" * (depth - 1), (b"}U\x01a" * depth + b"N" + b"s" * depth)])
    if rng.random() < 0.3:
        path.write_bytes(b"\x80\x02" + deep + b".")
        return f"a pickle nested {depth} deep"
    state = torch.load(path, weights_only=True)
    name = rng.choice([*state])
    placeholder = "in the place of this text"
    state[name] = placeholder
    torch.save(state, path)
    written = b"X" + struct.pack("<I", len(placeholder)) + placeholder.encode()
    _rewrite_pickle(path, lambda program: program.replace(written, deep))
    return f"{name} nested {depth} deep"


ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, -1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 5000, "two\nlines", "\x1b[2J", "1", "nan"),
    *([], [[]], ["x"], [1, 2, 3], [None], {}, {"x": {}}, {1: 2}, (), (1, 2), b"bytes"),
    *(torch.zeros(0), torch.tensor(float("nan")), torch.zeros(3, 3), torch.tensor([-5]), torch.arange(3) * 10**9),
    *(torch.tensor(1), torch.zeros(2, dtype=torch.complex64), torch.zeros(5000, dtype=torch.uint8), torch.zeros(1).expand(10**10)),
]


def _odd_field(rng: random.Random, path: Path) -> str:
    """Another value, or none, in the place of one anywhere in the state."""
    state = torch.load(path, weights_only=True)
    described = _oddly_changed(rng, state, ODD_VALUES)
    torch.save(state, path)
    return described


def _oddly_changed(rng: random.Random, content: dict | list, values: list) -> str:
    """Put one of ``values``, or nothing, in the place of an entry anywhere in ``content``; what was done, for people."""
    holder, trail = content, []
    while True:
        # Tensors are many; everything else should have its turn.
        key = rng.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        trail.append(str(key))
        inner = holder[key]
        if not (isinstance(inner, (dict, list)) and inner and rng.random() < 0.75):
            break
        holder = inner
    # To train for billions of epochs is no damage that could be seen.
    value = rng.choice([v for v in values if key != "epochs" or not isinstance(v, int) or v <= 2])
    if rng.random() < 0.15:
        del holder[key]
        shown = "gone"
    else:
        holder[key] = value
        shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:40]
    return f"{'.'.join(trail)[:80]}: {shown}"


def _swapped(rng: random.Random, folder: Path, runs: Runs) -> Case:
    for name, path in (("GE", runs.training("GE")), ("IMTA", runs.training("IMTA")), ("half", runs.half), ("other", runs.other)):
        shutil.copytree(path, folder / name)
    _picture(rng).save(folder / "good.png")
    other_file = rng.choice(["GE/log.jsonl", "GE/policy.json", "GE/curves.png", "GE", "nowhere.pt", "good.png", "cwd/x\ny.pt"])
    evaluate = ["--evalmode", rng.choice(["anytime", "dynamic"])]
    # file to replace, file to put there, program, arguments
    replaced, by, program, argv = rng.choice(
        [
            ("GE/last.pt", "IMTA/last.pt", "train_GE", ["--save", "../GE", "--resume"]),
            ("GE/last.pt", "GE/best.pt", "train_GE", ["--save", "../GE", "--resume"]),
            ("GE/best.pt", "other/best.pt", "train_GE", ["--save", "../GE", "--resume"]),
            ("half/best.pt", "IMTA/best.pt", "train_IMTA", ["--save", "../half", "--resume"]),
            ("half/last.pt", "other/last.pt", "train_GE", ["--save", "../half", "--resume", "--nBlocks", "3"]),
            ("GE/policy.json", "IMTA/policy.json", "train_GE", ["--save", "../GE", "--evalmode", "runtime"]),
            ("IMTA/policy.json", "other/policy.json", "predict", ["--checkpoint", "../IMTA/best.pt", "../good.png"]),
            ("", "", "predict", ["--checkpoint", "../IMTA/best.pt", "--policy", "../GE/policy.json", "../good.png"]),
            ("", "", "predict", ["--checkpoint", f"../{other_file}", "../good.png"]),
            ("", "", "engine.convert", [f"../{other_file}", "../new/released.pth.tar"]),
            ("", "", "train_IMTA", ["--pretrained", "../IMTA", *STARTS]),
            ("", "", "train_IMTA", ["--pretrained", "../other", "--nBlocks", "3", *STARTS]),
            ("", "", "train_IMTA", ["--pretrained", "../GE/log.jsonl", *STARTS]),
            ("", "", "train_GE", ["--evaluate-from", "../other/best.pt", "--save", "../GE", *evaluate]),
            ("", "", "train_GE", ["--evaluate-from", f"../{other_file}", "--save", "../new", *evaluate]),
            ("", "", "train_IMTA", ["--save", "../GE", "--resume"]),
            ("", "", "train_GE", ["--save", "../GE", *SETUP]),
            ("", "", "train_IMTA", ["--save", "../GE", "--pretrained", "../other", "--epochs", "1"]),
        ]
    )
    if replaced:
        shutil.copyfile(folder / by, folder / replaced)
    return Case("", folder, program, argv, f"{by} as {replaced}" if replaced else "another file", may_work=False)


def _released(rng: random.Random, folder: Path, runs: Runs) -> Case:
    """A checkpoint of a released program, damaged."""
    state = torch.load(runs.training("GE") / "best.pt", weights_only=True)
    network = build_network(state["network"])
    network.load_state_dict(state["state_dict"])
    path = folder / "released.pth.tar"
    torch.save({"epoch": 3, "arch": "msdnet_ge", "state_dict": to_released(network), "best_acc1": 1.0}, path)
    damage = rng.choice([_truncate, _flip_bits, _odd_field, _odd_field, _odd_field, _run_code])
    described = damage(rng, path) if damage is not _run_code else _run_code_in(rng, folder, path)
    started = ["--val-size", "64", "--save", "../new"]
    program, argv = rng.choice(
        [
            ("train_GE", ["--evaluate-from", "../released.pth.tar", "--evalmode", "anytime", *started]),
            ("train_IMTA", ["--pretrained", "../released.pth.tar", "--epochs", "1", "--batch-size", "32", *started]),
            ("predict", ["--checkpoint", "../released.pth.tar", "x.png"]),
        ]
    )
    return Case("", folder, program, argv, described, may_work=damage is _odd_field)


def _run_code_in(rng: random.Random, folder: Path, path: Path) -> str:
    inside = folder / "x" / path.name
    inside.parent.mkdir()
    path.rename(inside)
    described = _run_code(rng, inside)
    inside.rename(path)
    inside.parent.rmdir()
    return described


# Images.


def _picture(rng: random.Random, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def _png_of(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _encoded(rng: random.Random) -> tuple[bytes, str]:
    form, suffix = rng.choice([("PNG", ".png"), ("JPEG", ".jpg"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("WEBP", ".webp"), ("PPM", ".ppm")])
    stream = io.BytesIO()
    _picture(rng, rng.choice([(32, 32), (200, 150), (1, 1)])).save(stream, form)
    return stream.getvalue(), suffix


def _broken_image(rng: random.Random, folder: Path, stem: str) -> str:
    """Make one in ``folder``; some of them can be read all the same."""
    content, suffix = _encoded(rng)
    choice = rng.choice(
        ["cut", "cut", "flipped", "huge", "huge", "text", "directory", "zero", "noise", "link", "pipe", "thin", "odd mode", "suffix"]
    )
    path = folder / f"{stem}{suffix}"
    if choice == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif choice == "flipped":
        path.write_bytes(content)
        _flip_bits(rng, path)
    elif choice == "huge":
        width, height = rng.choice([(2**31 - 1, 2**31 - 1), (60_000, 60_000), (20_000, 20_000), (0, 0), (2**31 - 1, 1)])
        path = folder / f"{stem}.png"
        path.write_bytes(_png_of(width, height, bytes(1000)))
    elif choice == "text":
        path.with_suffix(".jpg").write_text("not an image\n" * rng.randrange(1, 100))
    elif choice == "directory":
        path.mkdir()
    elif choice == "zero":
        path.write_bytes(b"")
    elif choice == "noise":
        path.write_bytes(rng.randbytes(5000))
    elif choice == "link":
        path.symlink_to(rng.choice([path.name, "nowhere.png", "."]))
    elif choice == "pipe":
        os.mkfifo(path)
    elif choice == "thin":
        # So thin that its shorter side, scaled up, makes the longer one enormous.
        long = rng.choice([60_000, 1_000_000, 50_000_000])
        path = folder / f"{stem}.png"
        path.write_bytes(_png_of(1, long, bytes(4 * long)) if rng.random() < 0.5 else _png_of(long, 1, bytes(1 + 3 * long)))
    elif choice == "odd mode":
        mode, form = rng.choice([("CMYK", "jpg"), ("L", "png"), ("P", "gif"), ("1", "png"), ("I;16", "png"), ("LA", "png"), ("F", "tif")])
        Image.new(mode, (32, 32)).save(folder / f"{stem}.{form}")
    else:
        path.with_suffix(rng.choice([".gif", ".pgm", ".tiff"])).write_bytes(content)
    return choice


def _predict_images(rng: random.Random, folder: Path, runs: Runs) -> Case:
    shutil.copytree(runs.training("GE"), folder / "GE")
    images = folder / "images"
    images.mkdir()
    _picture(rng).save(images / "a.png")
    count = rng.randrange(1, 4)
    damage = [_broken_image(rng, images, f"b{i}") for i in range(count)]
    damaged = sorted(path for path in images.iterdir() if path.name != "a.png")
    named = ["../images"] if rng.random() < 0.5 else [f"../images/{path.name}" for path in [images / "a.png", *damaged]]
    argv = ["--checkpoint", "../GE/best.pt", "--batch-size", rng.choice(["1", "2", "64"]), "--format", rng.choice(["csv", "json", "table"])]
    return Case("", folder, "predict", [*argv, *named], ", ".join(damage), writes=(), skipped=count)


def _folder_images(rng: random.Random, folder: Path, runs: Runs) -> Case:
    images = folder / "images"
    for part, count in (("train", 20), ("test", 4)):
        for name in ("ant", "bee"):
            (images / part / name).mkdir(parents=True)
            for i in range(count):
                _picture(rng).save(images / part / name / f"{i}.png")
    where = images / rng.choice(["train", "train", "test"]) / rng.choice(["ant", "bee"])
    damage = rng.choice(["image"] * 6 + ["no images", "file", "missing", "one class"])
    if damage == "image":
        damage = _broken_image(rng, where, "0x")
    elif damage == "no images":
        for path in where.iterdir():
            path.unlink()
    else:
        shutil.rmtree(where if damage != "one class" else where.parent)
        if damage == "file":
            where.write_text("in the way")
    large = ["--image-size", "72", "--no-small-inputs", "--workers", rng.choice(["0", "0", "2"])]
    size = rng.choice([["--image-size", "32"], ["--image-size", "32"], large])
    argv = [*SETUP, "--data", "folder", "--data-root", "../images", "--val-size", "8", "--batch-size", "8", *size, "--save", "../new"]
    return Case("", folder, "train_GE", argv, f"{where.relative_to(folder)}: {damage}", late=size is large)


# Flags.

WORDS = [
    *("", "0", "-1", "1", "2", "3", "7", "64", "1e400", "nan", "inf", "-inf", "0.5", "1.5", "1e-320", "1e300", "-0", "0x10"),
    *(
        str(10**6),
        str(2**31),
        str(2**63),
        str(10**30),
        "9" * 5000,
        "x",
        "é",
        "\udcff",
        "two\nlines",
        "\x1b[2J",
        "1,2",
        "1-2-4",
        "0-0",
        "-",
        ",",
    ),
    *("%s", "{}", "--lr", "None", "True", " 3", "\u0663", "x" * 300, "x" * 5000, "1_0", "../nowhere/at/all", "../GE/best.pt", "../GE", "/"),
]
LIKELY = ["1", "2", "3", "0.5", "1-2-4"]
# An epoch takes its time, and so many processes take the machine's; to ask for them is no mistake.
UNTRIED = ("help", "save", "output", "compile")  # the cases choose where to write themselves; to compile takes minutes
MODEST = {"--epochs": ("0", "-1", "1", "2", "nan", "x", "", "1.5", "9" * 5000), "--workers": ("0", "-1", "1", "nan", "x", "")}


def _random_flags(rng: random.Random, parser: argparse.ArgumentParser, count: int) -> list[str]:
    actions = [action for action in parser._actions if action.option_strings and action.dest not in UNTRIED]
    words: list[str] = []
    for action in rng.sample(actions, count):
        flag = rng.choice(action.option_strings)
        words.append(flag)
        if action.nargs == 0:
            continue
        if action.choices and rng.random() < 0.6:
            words.append(rng.choice([*action.choices]))
        elif action.nargs != "?" or rng.random() < 0.5:
            words.append(rng.choice(LIKELY if rng.random() < 0.4 else MODEST.get(action.option_strings[0], WORDS)))
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice([*WORDS, "--no-such-flag", "-", "--"]))
    return words


def _training_flags(stage: str) -> Callable:
    def make_case(rng: random.Random, folder: Path, runs: Runs) -> Case:
        shutil.copytree(runs.training("GE"), folder / "GE")
        target = rng.choice(["../new"] * 6 + ["../GE", "../GE/best.pt", "../GE/best.pt/x", "../" + "x" * 300, "../\udcff", "../two\nlines"])
        start = SETUP if stage == "GE" else ["--pretrained", "../GE", "--epochs", "1", "--batch-size", "32"]
        argv = [*start, "--save", target, *_random_flags(rng, args.build_parser(stage), rng.choice([1, 1, 2, 3, 6]))]
        # What --overwrite and --resume are for.
        name = target.removeprefix("../").split("/")[0]
        return Case("", folder, f"train_{stage}", argv, "flags", writes=("new", name))

    return make_case


def _predict_flags(rng: random.Random, folder: Path, runs: Runs) -> Case:
    shutil.copytree(runs.training("GE"), folder / "GE")
    _picture(rng).save(folder / "good.png")
    case = Case("", folder, "predict", [], "flags", writes=("new",))
    case.argv = ["--checkpoint", "../GE/best.pt", "../good.png", *_random_flags(rng, predict.parser(), rng.choice([0, 1, 1, 2, 3]))]
    output = rng.choice([None, "../new/answers.csv", "../GE", "../" + "x" * 300, "../pipe", "../device", "../GE/best.pt/x", ""])
    if output == "../pipe":
        os.mkfifo(folder / "pipe")
        case.pipes.append(folder / "pipe")
    if output == "../device":
        # A twin of /dev/null, which a program that puts a file in its place would take from the whole machine.
        with contextlib.suppress(OSError):
            os.mknod(folder / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        case.writes = ("new",) if (folder / "device").exists() else ("new", "device")
    case.argv += ["--output", output] if output is not None else []
    if rng.random() < 0.2:
        case.argv.append(rng.choice(["../nowhere.png", "../GE", "/dev/null", "", "x" * 300, "two\nlines.png", "\udcff.png"]))
    case.skipped = 3
    return case


# Tables and records of an earlier run.


def _odd_json(rng: random.Random, path: Path) -> str:
    content = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    described = _oddly_changed(rng, content, [v for v in ODD_VALUES if not isinstance(v, (torch.Tensor, bytes))])
    path.write_text(json.dumps(content) + "\n")
    return described


def _absurd_json(rng: random.Random, path: Path) -> str:
    content = json.loads(path.read_text().splitlines()[0]) if path.suffix == ".jsonl" else json.loads(path.read_text())
    form = rng.choice(["many exits", "many points", "deep lists", "deep objects", "NaN", "huge number", "twice", "a list", "bytes"])
    text = json.dumps(content)
    if form == "many exits" and "operations" in content:
        content["operations"] = list(range(1, 10**6))
        text = json.dumps(content)
    elif form == "many points" and "points" in content:
        content["points"] *= 10_000 // len(content["points"]) + 1
        text = json.dumps(content)
    elif form == "deep lists":
        text = "[" * 100_000 + "]" * rng.choice([0, 100_000])
    elif form == "deep objects":
        text = '{"points": ' * 100_000 + "1" + "}" * 100_000
    elif form == "NaN":
        text = text.replace(": 1", f": {rng.choice(['NaN', 'Infinity', '-Infinity', '1e999'])}", 3)
    elif form == "huge number":
        text = text.replace(": 1", ": 1" + "0" * rng.choice([400, 5000]), 3)
    elif form == "twice":
        text += text
    elif form == "a list":
        text = f"[{text}]"
    else:
        text = "\ufeff" + text
    path.write_text(text)
    return form


def _odd_table(rng: random.Random, path: Path) -> str:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    form = rng.choice(["cell", "cell", "cell", "row cut", "column gone", "no header", "header only", "long", "quote", "NUL"])
    row = rng.randrange(1, len(rows))
    column = rng.randrange(len(rows[0]))
    if form == "cell":
        rows[row][column] = rng.choice(["", "x", "nan", "inf", "-1", "1e308", "1e400", "-1e308", "9" * 5000, '"', "two\nlines"])
        form += f" {rows[row][column]:.20}"
    elif form == "row cut":
        rows[row] = rows[row][:column]
    elif form == "column gone":
        rows = [line[:column] + line[column + 1 :] for line in rows]
    elif form == "no header":
        rows = rows[1:]
    elif form == "header only":
        rows = rows[:1]
    elif form == "long":
        rows += rows[1:] * 2000
    elif form == "quote":
        rows[row][0] = '"' + "x" * 200_000
    else:
        rows[row][0] = "\0"
    path.write_text("\n".join(",".join(line) for line in rows) + "\n")
    return form


def _policy(rng: random.Random, folder: Path, runs: Runs) -> Case:
    shutil.copytree(runs.training("GE"), folder / "GE")
    _picture(rng).save(folder / "good.png")
    damage = rng.choice([_truncate, _flip_bits, _empty, _noise, _odd_json, _odd_json, _odd_json, _absurd_json, _absurd_json])
    described = damage(rng, folder / "GE/policy.json")
    predicts = ("predict", ["--checkpoint", "../GE/best.pt", "../good.png", "--budget", rng.choice(["1", "30%", "99%", "1000"])])
    program, argv = rng.choice([predicts, predicts, ("train_GE", ["--save", "../GE", "--evalmode", "runtime"])])
    return Case("", folder, program, argv, described, writes=("GE",))


def _tables(rng: random.Random, folder: Path, runs: Runs) -> Case:
    """Tables that the pictures of a later run or evaluation show."""
    shutil.copytree(runs.training("GE"), folder / "GE")
    path = folder / "GE" / rng.choice(["anytime.csv", "budgeted.csv", "optimised.csv"])
    damage = rng.choice([_truncate, _flip_bits, _empty, _noise, _odd_table, _odd_table, _odd_table, _odd_table])
    described = f"{path.name}: {damage(rng, path)}"
    evaluates = ("train_GE", ["--save", "../GE", "--evalmode", rng.choice(["anytime", "dynamic"])])
    program, argv = rng.choice([evaluates, ("train_IMTA", ["--pretrained", "../GE", *STARTS])])
    return Case("", folder, program, argv, described, writes=("GE", "new"), late=True)


def _records(rng: random.Random, folder: Path, runs: Runs) -> Case:
    """The log and the record of a run that goes on or is evaluated."""
    name, half = rng.choice(["log.jsonl", "log.jsonl", "run.json"]), rng.random() < 0.7
    shutil.copytree(runs.half if half else runs.training("GE"), folder / "run")
    path = folder / "run" / name
    damage = rng.choice([_truncate, _flip_bits, _empty, _noise, _odd_json, _odd_json, _absurd_json])
    described = f"{name}: {damage(rng, path) if path.exists() and path.stat().st_size else 'missing'}"
    argv = ["--save", "../run", *(["--resume"] if half else ["--evalmode", "anytime"])]
    return Case("", folder, "train_GE", argv, described, writes=("run",))


MAKERS: dict[str, Callable[[random.Random, Path, Runs], Case]] = {
    "truncated": _bytes_damaged(_truncate),
    "flipped": _bytes_damaged(_flip_bits, may_work=True),
    "empty": _bytes_damaged(_empty),
    "noise": _bytes_damaged(_noise),
    "code": _bytes_damaged(_run_code),
    "sizes": _bytes_damaged(_absurd_sizes, may_work=True),
    "nested": _bytes_damaged(_nested, may_work=True),
    "field": _bytes_damaged(_odd_field, may_work=True),
    "swapped": _swapped,
    "released": _released,
    "image to predict": _predict_images,
    "image to train on": _folder_images,
    "flags of stage 1": _training_flags("GE"),
    "flags of stage 2": _training_flags("IMTA"),
    "flags of predict": _predict_flags,
    "policy": _policy,
    "tables": _tables,
    "records": _records,
}
# What fails in more ways comes more often.
KINDS = [*MAKERS, *["field"] * 4, "image to predict", "image to train on", "flags of stage 1", "flags of stage 2", "policy"]
