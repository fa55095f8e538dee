"""Lost processes end a run with one line and no orphans; several processes resume exactly where they were."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint
from engine.report import read_csv
from tests import disturbed, forkserver
from tests.compare import differences
from tests.conftest import TINY_MSDNET_FLAGS, TINY_TRAINING

ROOT = Path(__file__).parent.parent
TRAINING = ["--save", "run", *TINY_TRAINING, "--print-freq", "1"]
FOLDER = [
    *("--data", "folder", "--image-size", "72", "--no-small-inputs", "--val-size", "12"),
    *("--batch-size", "12", "--epochs", "2"),
]
LONGEST = 60  # seconds until a run without one of its processes must have ended
LONGEST_STOP = 5  # seconds until a signal must have ended a process that only waits
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which only Linux has")


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(folder, *flags, processes=2, network=TINY_MSDNET_FLAGS, **environment):
    """Run ``tests/disturbed.py`` in ``folder``, as torchrun would start it."""
    port = free_port()
    ranks = [
        {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        for rank in range(processes)
    ]
    environments = [{**(variables if processes > 1 else {}), **environment} for variables in ranks]
    words = [*TRAINING, *network, *flags]
    return forkserver.run(disturbed.main, words, folder, *environments)


def processes_in(folder):
    """Processes that still work in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink().is_relative_to(folder):
                found.append(path.name)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(folder)
    assert ended.statuses == [0, 0], ended.errors
    assert ended.output.count("evaluating the best epoch") == 1
    assert "2 processes" in ended.output
    return folder


def test_evaluation_gathered_from_two_processes_equals_that_of_one(undisturbed):
    gathered = read_csv(undisturbed / "run" / "anytime.csv")
    assert run(undisturbed, "--evalmode", "anytime", processes=1).statuses == [0]
    assert read_csv(undisturbed / "run" / "anytime.csv") == gathered


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_goes_on(undisturbed, tmp_path):
    """On two machines as ``docs/usage.md`` says.

    One process is late at the second start, and the other must wait for its new address.
    """
    place = [
        *("--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"),
        *("--rdzv_id", "one"),
    ]
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", *place, "--nproc_per_node", "1"),
        *("--max-restarts", "1"),
    ]
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    disturbance = {"MARKER": str(tmp_path / "marker"), "SIGNAL": str(int(signal.SIGKILL)), "LATE": "1"}
    command = [*launcher, disturbed.__file__, *TRAINING, *TINY_MSDNET_FLAGS, "--save-every-steps", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **environment, **disturbance}, **streams)
        for _ in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=170)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert any("resuming" in output for output in outputs)
    assert differences(tmp_path / "run", undisturbed / "run") == []


def test_a_killed_process_ends_the_others(undisturbed, tmp_path):
    began = time.monotonic()
    ended = run(tmp_path, "--save-every-steps", "1", SIGNAL=int(signal.SIGKILL), MARKER="marker")
    assert ended.statuses == [1, -signal.SIGKILL]
    assert time.monotonic() - began < LONGEST
    assert "train_GE.py: another process of this run was lost (" in ended.errors
    assert "; to resume: python train_GE.py" in ended.errors
    assert processes_in(tmp_path) == []
    assert run(tmp_path, "--resume").statuses == [0, 0]
    assert differences(tmp_path / "run", undisturbed / "run") == []


def test_two_processes_stop_together_and_go_on_exactly(undisturbed, tmp_path):
    ended = run(tmp_path, SIGNAL=int(signal.SIGTERM), MARKER="marker")
    assert ended.statuses == [143, 143]
    assert ended.errors.count("to resume: python train_GE.py") == 2
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 2)
    assert run(tmp_path, "--resume").statuses == [0, 0]
    assert differences(tmp_path / "run", undisturbed / "run") == []


@pytest.mark.slow
def test_two_processes_of_a_network_with_dropout_go_on_exactly(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    network = ["--arch", "mobilenet_v3_small", "--exits", "3"]  # drops a fifth of its last features
    ended = run(whole, network=network)
    assert ended.statuses == [0, 0], ended.errors
    ended = run(parts, network=network, SIGNAL=int(signal.SIGTERM), MARKER="marker")
    assert ended.statuses == [143, 143]
    ended = run(parts, "--resume", network=network)
    assert ended.statuses == [0, 0], ended.errors
    assert differences(parts / "run", whole / "run") == []


def test_threads_go_on_exactly(image_folder, tmp_path):
    """Also beside damaged images, which several processes skip as one does."""
    for path in ("train/ant/3.png", "train/bee/7.png", "test/ant/2.png"):
        (image_folder / path).write_bytes((image_folder / path).read_bytes()[:60])
    flags = [*FOLDER, "--data-root", str(image_folder), "--workers", "2", "--save-every-steps", "1"]
    flags += ["--augment", "trivial", "--skip-unreadable"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert run(whole, *flags, processes=1).statuses == [0]
    assert run(parts, *flags, processes=1, SIGNAL=int(signal.SIGKILL), MARKER="marker").statuses == [
        -signal.SIGKILL
    ]
    ended = run(parts, *flags, "--resume", processes=1)
    assert ended.statuses == [0], ended.errors
    assert "skipped: cannot read the image" in ended.errors
    assert differences(parts / "run", whole / "run") == []
    table = read_csv(whole / "run" / "anytime.csv")
    ended = run(whole, *FOLDER, "--data-root", str(image_folder), "--evalmode", "anytime")
    assert ended.statuses == [0, 0], ended.errors
    assert "the 14 test images" in ended.output
    assert read_csv(whole / "run" / "anytime.csv") == table


def test_sigterm_ends_a_process_that_waits_for_the_others(tmp_path):
    port = free_port()
    environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, tmp_path, processes=1, **environment)
        _wait_until_listening(port)
        began = time.monotonic()
        os.kill(int(processes_in(tmp_path)[0]), signal.SIGTERM)
        result = ended.result()
    assert result.statuses == [128 + signal.SIGTERM], result.errors
    assert time.monotonic() - began < LONGEST_STOP
    assert processes_in(tmp_path) == []


def _wait_until_listening(port):
    last = time.monotonic() + LONGEST
    while time.monotonic() < last:
        with socket.socket() as client:
            if client.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port}")
