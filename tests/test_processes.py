"""Lost processes end a run with one line and no orphans, and several processes go on exactly where they were."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_checkpoint
from tests.conftest import TINY_FLAGS

ROOT = Path(__file__).parent.parent
SMALL = [*TINY_FLAGS, "--limit-train", "96", "--limit-test", "50", "--print-freq", "1"]
LONGEST = 60  # seconds until a run without one of its processes must have ended

# Trains, and once sends this process a signal after two steps.
DISTURBED = """
import os, sys
from pathlib import Path
import train_GE
from engine.stepper import Stepper

real, marker, count = Stepper.step, Path(os.environ["MARKER"]), 0

def step(stepper, *arguments):
    global count
    real(stepper, *arguments)
    count += 1
    if os.environ.get("RANK", "1") == "1" and count == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

Stepper.step = step
sys.exit(train_GE.main(sys.argv[1:]))
"""


def start(folder, *flags, torchrun=(), number=None):
    """Run the program above in ``folder``; without ``number`` nobody is disturbed."""
    (folder / "program.py").write_text(DISTURBED)
    marker = folder / f"marker_{number}"
    if number is None:
        marker.touch()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *torchrun]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MARKER": str(marker)}
    return subprocess.run(
        [*(launcher if torchrun != "alone" else [sys.executable]), str(folder / "program.py"), "--save", "run", *SMALL, *flags],
        cwd=folder,
        env={**os.environ, **environment, "SIGNAL": str(int(number or 0))},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def final_state(folder):
    state = load_checkpoint(folder / "run" / "last.pt")
    return {**state["state_dict"], **{f"momentum_{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def processes_of(folder):
    """Command lines of the processes that still work for a run in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in found if str(folder) in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = start(folder)
    assert result.returncode == 0, result.stderr
    return final_state(folder)


def test_torchrun_starts_a_killed_process_again_and_goes_on(undisturbed, tmp_path):
    result = start(tmp_path, "--save-every-steps", "1", torchrun=["--max-restarts", "1"], number=signal.SIGKILL)
    assert result.returncode == 0, result.stderr
    assert "going on with" in result.stdout
    assert_same(final_state(tmp_path), undisturbed)


def test_a_killed_process_ends_the_others(undisturbed, tmp_path):
    began = time.monotonic()
    result = start(tmp_path, "--save-every-steps", "1", number=signal.SIGKILL)
    assert result.returncode == 1
    assert time.monotonic() - began < LONGEST
    assert "train_GE.py: another process of this run was lost (" in result.stderr
    assert "; go on with --resume" in result.stderr
    assert processes_of(tmp_path) == []
    assert start(tmp_path, "--resume").returncode == 0
    assert_same(final_state(tmp_path), undisturbed)


def test_two_processes_stop_together_and_go_on_exactly(undisturbed, tmp_path):
    result = start(tmp_path, number=signal.SIGTERM)
    assert result.returncode != 0
    assert result.stderr.count("go on with --resume") == 2
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 2)
    assert start(tmp_path, "--resume").returncode == 0
    assert_same(final_state(tmp_path), undisturbed)


FOLDER = ["--data", "folder", "--image-size", "72", "--no-small-inputs", "--val-size", "12", "--batch-size", "12", "--epochs", "2"]


def test_several_workers_go_on_exactly(image_folder, tmp_path):
    flags = [*FOLDER, "--data-root", str(image_folder), "--workers", "2", "--save-every-steps", "1"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert start(tmp_path / "whole", *flags, torchrun="alone").returncode == 0
    assert start(tmp_path / "parts", *flags, torchrun="alone", number=signal.SIGKILL).returncode == -signal.SIGKILL
    result = start(tmp_path / "parts", *flags, "--resume", torchrun="alone")
    assert result.returncode == 0, result.stderr
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


KILLED_WORKER = """
import os, signal, sys
import dataloader, train_GE

real = dataloader._ImageFiles.__getitem__

def getitem(files, key):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(files, key)

parent = os.getpid()
dataloader._ImageFiles.__getitem__ = getitem
sys.exit(train_GE.main(sys.argv[1:]))
"""


def test_a_killed_worker_ends_the_run(image_folder, tmp_path):
    (tmp_path / "program.py").write_text(KILLED_WORKER)
    began = time.monotonic()
    result = subprocess.run(
        [
            sys.executable,
            str(tmp_path / "program.py"),
            "--save",
            "run",
            *SMALL,
            *FOLDER,
            "--data-root",
            str(image_folder),
            "--workers",
            "2",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert time.monotonic() - began < LONGEST
    assert result.returncode == 1
    assert "a process that loads images was lost" in result.stderr
    assert result.stderr.count("\n") == 1
    assert processes_of(tmp_path) == []
