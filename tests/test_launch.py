"""A training chooses its precision, compilation and number of processes, and all its processes agree."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_GE
from engine.auto import resolve_auto
from engine.checkpoint import save_checkpoint
from engine.resuming import checkpoint_to_resume
from engine.run_directory import RunDirectory
from engine.runtime import precision
from engine.runtime.device import limit_threads_of_steps
from engine.runtime.distributed import (
    Processes,
    leave_process_group,
    process_group,
    torchrun_environment,
)
from engine.runtime.failures import status_and_line
from engine.runtime.launch import may_fork, process_count, training_processes
from engine.runtime.signals import Interrupted, handle_signals
from image_data.data_sets import find_data_set
from settings.command_line import parse
from tests import disturbed, forkserver
from tests.conftest import TINY_FLAGS
from tests.helpers import make_network
from train_GE import Stage1
from train_IMTA import Stage2
from utils import UserError

CPU = Processes(0, 1, torch.device("cpu"), ())
LONGEST = 10  # seconds that a name takes to resolve in a test

forks = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are workers forked")


@pytest.mark.parametrize(
    ("has_instructions", "seconds", "expected"),
    [
        (True, {torch.bfloat16: 1, None: 2}, torch.bfloat16),
        (True, {torch.bfloat16: 3, None: 2}, None),
        (False, {}, None),
    ],
)
def test_16_bits_on_a_cpu_that_multiplies_them_and_gains(monkeypatch, has_instructions, seconds, expected):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: has_instructions)
    monkeypatch.setattr(precision, "step_seconds", lambda network, images, dtype, trains: seconds[dtype])
    network = make_network(2).float()
    assert precision.fastest_dtype(torch.device("cpu"), network, 32, 10**6, 8, trains=True) is expected


@pytest.mark.parametrize("trains", [True, False])
def test_timing_a_network_leaves_it_and_the_threads_as_they_were(monkeypatch, trains):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    network = make_network(2).float().train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    threads = torch.get_num_threads()
    chosen = precision.fastest_dtype(torch.device("cpu"), network, 32, 10**6, 8, trains)
    assert chosen in (None, torch.bfloat16)
    assert network.training
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(x.equal(before[name]) for name, x in network.state_dict().items())


def test_a_network_without_operations_in_bfloat16_is_not_trained_in_it(monkeypatch):
    def step_seconds(network, images, dtype, trains):
        if dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return 1.0

    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "step_seconds", step_seconds)
    assert precision.fastest_dtype(torch.device("cpu"), make_network(2).float(), 32, 10**6, 8, True) is None


@pytest.mark.parametrize(
    ("dtype", "operations", "expected"),
    [(None, 1e6, 2), (torch.float16, 1e6, 2), (torch.bfloat16, 1e10, 1), (torch.bfloat16, 3e10, 2)],
)
def test_steps_in_bfloat16_take_threads_by_their_operations(monkeypatch, dtype, operations, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("engine.runtime.device.available_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        limit_threads_of_steps(dtype, operations)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_16_bits_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    network = make_network(2).float()
    assert precision.fastest_dtype(torch.device("cuda"), network, 32, 10**6, 8, trains=True) is expected


@pytest.mark.parametrize(("dtype", "amp"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (None, "off")])
def test_auto_precision_is_what_the_device_gains_by(monkeypatch, dtype, amp):
    monkeypatch.setattr("engine.auto.fastest_dtype", lambda *_: dtype)
    network = make_network(2)
    assert resolve_auto(parse("GE", []).settings(), CPU, network, 32, 10**6).amp == amp
    assert resolve_auto(parse("GE", ["--amp", "fp16"]).settings(), CPU, network, 32, 10**6).amp == "fp16"


def test_long_trainings_compile_their_steps(monkeypatch):
    """Arguments: operations of an epoch in a process."""

    def compiled(flags, images_by_operations, stage=None):
        stage = stage or Stage1()
        settings = parse(stage.name, flags).settings()
        share = stage.compile_speedup_share(settings)
        resolved = resolve_auto(
            settings,
            CPU,
            make_network(2),
            32,
            10**6,
            operations_per_process=images_by_operations,
            compile_speedup_share=share,
        )
        return resolved.compile

    cifar, whole = ["--preset", "cifar100"], 45_000 * 58e6
    assert compiled([], 5_500 * 16e6) == "off"
    assert compiled(cifar, whole / 2) == "default"
    assert compiled([*cifar, "--checkpoint-activations"], whole) == "off"
    assert compiled([*cifar, "--accumulate", "3"], whole) == "off"  # which does not divide 512
    assert compiled(["--compile", "default"], 1) == "default"
    assert compiled(cifar, whole / 2, Stage2()) == "off"  # frozen, it is no faster on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiled(cifar, whole) == "reduce-overhead"  # one captured step
    assert compiled(cifar, whole, Stage2()) == "reduce-overhead"
    assert compiled([*cifar, "--accumulate", "2"], whole) == "default"


@pytest.mark.parametrize(
    ("cores", "batch", "processes"),
    [(1, 128, 1), (2, 128, 2), (2, 63, 1), (2, 32, 1), (8, 128, 4), (64, 512, 16), (3, 128, 2)],
)
def test_as_many_processes_as_cores_and_batch_allow(monkeypatch, cores, batch, processes):
    monkeypatch.delenv("PROCESSES")
    assert process_count(batch, cores=cores) == processes
    assert process_count(4 * batch, accumulate=4, cores=cores) == processes


@pytest.mark.parametrize(("own", "other"), [(3, 2), (2, 3), (3, 3), (-1, 5)])
def test_numbers_of_all_processes_are_compared(own, other):
    class Two(Processes):
        def all_reduce_max(self, value):
            return max(value, other if value == own else -other)

    assert Two(0, 2, CPU.device, ()).all_equal(own) is (own == other)


def test_processes_can_be_chosen(monkeypatch):
    monkeypatch.setenv("PROCESSES", "3")
    assert process_count(32) == 3
    for wanted in ("many", "0", "33"):
        monkeypatch.setenv("PROCESSES", wanted)
        with pytest.raises(UserError, match=f"PROCESSES={wanted}"):
            process_count(32)


def print_may_fork(_):
    """Print what ``may_fork`` says in a program, one with a GPU, a thread, and an interactive session."""
    print(may_fork(None), may_fork((0,)))
    with ThreadPoolExecutor(1) as pool:
        print(pool.submit(may_fork, None).result())
    sys.ps1 = ">>> "
    print(may_fork(None))
    return 0


@forks
def test_workers_are_forked_from_a_program_and_not_from_a_session_or_a_thread(tmp_path):
    ended = forkserver.run(print_may_fork, [], tmp_path)
    assert (ended.output.split(), ended.errors) == (["True", "False", "False", "False"], "")


def test_signals_are_left_alone_in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        before = signal.getsignal(signal.SIGTERM)

        def listen():
            with handle_signals() as requests:
                return requests.stop_signal, signal.getsignal(signal.SIGTERM)

        assert pool.submit(listen).result() == (0, before)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"TORCHELASTIC_RESTART_COUNT": "many"}, "TORCHELASTIC_RESTART_COUNT='many'"),
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR='' and MASTER_PORT=''"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT=''"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29511"}, "cannot meet"),
    ],
)
def test_what_a_scheduler_left_in_the_environment_is_refused(monkeypatch, variables, message):
    def resolve(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), process_group(None):
        pass


def test_a_signal_is_handled_while_a_name_is_resolved(monkeypatch):
    class Stopped(Exception):
        pass

    def stop(number, frame):
        raise Stopped

    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: never.wait(LONGEST))
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "slow", "MASTER_PORT": 29511}.items():
        monkeypatch.setenv(name, str(value))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    began = time.monotonic()
    try:
        with pytest.raises(Stopped), process_group(None):
            pass
    finally:
        never.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < LONGEST / 2


def test_a_port_that_another_program_uses_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"localhost:{port}"), process_group(None):
            pass


def test_empty_variables_count_as_not_set(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert torchrun_environment() == (0, 1, 0, 1, 0)
    monkeypatch.setenv("RANK", "0")
    assert torchrun_environment().rank == 0


def train(folder, *flags, stdout=None, **environment):
    """Run ``tests/disturbed.py`` in two processes."""
    argv = [*TINY_FLAGS, "--save", "run", *flags]
    return forkserver.run(disturbed.main, argv, folder, {"PROCESSES": 2, **environment}, stdout=stdout)


@forks
def test_forked_processes_train_together_and_speak_once(tmp_path):
    result = train(tmp_path, "--amp", "bf16", "--epochs", "2")
    assert result.statuses == [0], result.errors
    assert "CPU, 2 processes, bf16" in result.output
    assert result.output.count("evaluating the best epoch") == 1
    assert result.errors == ""
    mistake = train(tmp_path, "--save", "other", "--val-size", "100000")
    assert (mistake.statuses, mistake.errors.count("\n")) == ([2], 1)


@forks
def test_the_run_ends_with_the_reason_of_a_copy(tmp_path):
    """Such as an image of its share that cannot be read."""
    result = train(tmp_path, COPY_FAILS=1)
    assert (result.statuses, result.errors) == ([2], "train_GE.py: cannot read the image bad.jpg\n")


@forks
def test_the_run_ends_with_the_bug_of_a_copy_which_never_returns_to_the_caller(tmp_path):
    result = train(tmp_path, COPY_BREAKS=1, RETURNS="returns.txt")
    assert result.statuses == [1], result.errors
    assert "Traceback" in result.errors
    assert result.errors.endswith("\ntrain_GE.py: a worker ended with ZeroDivisionError: a bug\n")
    assert (tmp_path / "returns.txt").read_text() == "returned\n"


@forks
def test_a_copy_that_is_killed_before_all_have_met_ends_the_run(tmp_path):
    result = train(tmp_path, COPY_DIES=1)
    assert result.statuses == [1], result.errors
    assert result.errors.count("\n") == 1
    assert "another process of this run was lost" in result.errors


def refuse_the_second_fork(_):
    """Print the error of a start in three processes, whether a worker is left, and the files that are."""
    real, forks = os.fork, []

    def fork():
        if forks:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        forks.append(real())
        return forks[0]

    os.fork, tempfile.tempdir = fork, str(Path.cwd() / "temporary")
    try:
        with training_processes(96, None):
            pass
    except UserError as error:
        print(error)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        print("a worker is left")
    print(list(Path("temporary").iterdir()))
    return 0


@forks
def test_a_process_that_cannot_be_forked_leaves_nothing_behind(tmp_path):
    (tmp_path / "temporary").mkdir()
    ended = forkserver.run(refuse_the_second_fork, [], tmp_path, {"PROCESSES": 3})
    assert ended.output.splitlines() == [
        "cannot start 3 processes: Resource temporarily unavailable; PROCESSES=1 starts no others",
        "[]",
    ]


def test_a_second_signal_stops_at_once(monkeypatch):
    """But Slurm, and systemd and torchrun together, send the same one twice."""
    now = [100.0]
    monkeypatch.setattr("engine.runtime.signals.time.monotonic", lambda: now[0])
    with handle_signals() as requests, requests.deferred():
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.5
        signal.raise_signal(signal.SIGTERM)
        assert requests.stop_signal == signal.SIGTERM
        now[0] += 1
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_the_end_of_the_terminal_stops_a_run_unless_it_is_ignored():
    """As ``nohup`` ignores it."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with handle_signals() as requests, requests.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert requests.stop_signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with handle_signals() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.stop_signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_made_of_an_interruption_is_the_signal():
    with handle_signals() as requests:
        assert isinstance(requests.reason(ValueError("a bug")), ValueError)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        assert requests.reason(ValueError("Invalid bounding box")).exit_status == 128 + signal.SIGTERM
        assert isinstance(requests.reason(UserError("the disk is full")), UserError)


def signal_within_the_fork(_):
    """Send SIGTERM from a function that Python calls before it forks, and print what comes of it."""
    main_process = os.getpid()
    os.register_at_fork(before=lambda: os.kill(main_process, signal.SIGTERM))
    try:
        with handle_signals() as requests, training_processes(64, None, requests):
            print("trained")
    except Interrupted as interrupted:
        print(interrupted.exit_status)
    logging.getLogger("after").info("a lock that stayed taken would hang here")
    return 0


@forks
def test_a_signal_within_a_fork_stops_the_run(tmp_path):
    ended = forkserver.run(signal_within_the_fork, [], tmp_path, {"PROCESSES": 2})
    assert (ended.output.splitlines(), ended.errors) == (["143"], "")


def leave_often(_):
    for _ in range(50):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for _ in range(20):
            dist.all_reduce(torch.ones(4), async_op=True)
        leave_process_group()
    return 0


def test_no_process_hangs_when_it_leaves_the_others(tmp_path):
    """Gloo's threads may then still have tensors to free, for which they need Python's global lock."""
    ended = forkserver.run(leave_often, [], tmp_path, {"GLOO_SOCKET_IFNAME": "lo"})
    assert ended.statuses == [0], ended.errors


def leave_after_training(_):
    others = thread_ids()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    of_gloo = thread_ids() - others
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.cycle = model
    del model
    leave_process_group()
    deadline = time.monotonic() + LONGEST  # the system still lists a thread for a moment after its end
    while of_gloo & thread_ids() and time.monotonic() < deadline:
        time.sleep(0.01)
    print(len(of_gloo), len(of_gloo & thread_ids()))
    return 0


def thread_ids():
    return set(Path("/proc/self/task").iterdir())


@forks
def test_none_of_gloos_threads_outlives_the_process_group(tmp_path):
    """Python's end may abort a process whose threads have a tensor to free."""
    ended = forkserver.run(leave_after_training, [], tmp_path, {"GLOO_SOCKET_IFNAME": "lo"})
    assert ended.statuses == [0], ended.errors
    before, after = map(int, ended.output.split())
    assert before > 0
    assert after == 0


def test_processes_of_torchrun_are_not_resumed_by_python(monkeypatch):
    command = parse("GE", ["--save", "my run", "--overwrite"])
    stopped = Interrupted(signal.SIGTERM, is_saved=True)
    words = "train_GE.py --save 'my run' --resume"
    assert status_and_line(stopped, command)[1].endswith(f"; to resume: python {words}")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    line = status_and_line(stopped, command)[1]
    assert line.endswith(f"; to resume: torchrun [its flags as before] {words}")


@pytest.fixture
def torchrun_run(finished, tmp_path, monkeypatch):
    """A directory with a finished run, a function that resumes it, and one that says how it was launched."""
    directory = RunDirectory(tmp_path / "GE")
    shutil.copytree(finished / "GE", directory.path)
    command = parse("GE", ["--save", str(directory.path), "--overwrite"])

    def resumes(**environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, str(value))
            return checkpoint_to_resume(command, "GE", directory) is not None

    def launched(launch, complete=True):
        save_checkpoint(directory.last, {**torch.load(directory.last, weights_only=True), "launch": launch})
        run = json.loads(directory.run_json.read_text())
        run["sessions"][-1]["complete"] = complete
        directory.run_json.write_text(json.dumps(run))

    return resumes, launched


def test_a_restart_on_one_machine_resumes_the_run_of_its_launch_alone(torchrun_run):
    resumes, launched = torchrun_run
    restart = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 1}
    launched(f"none {os.getppid()}")
    assert resumes(**restart)
    assert not resumes(**restart | {"TORCHELASTIC_RESTART_COUNT": 0})
    assert not resumes(TORCHELASTIC_RESTART_COUNT=1)
    launched(f"none {os.getppid() + 1}")
    assert not resumes(**restart)
    launched("none")
    assert not resumes(**restart)


def test_a_restart_on_several_machines_resumes_the_run_of_its_id(torchrun_run):
    """Only the id tells a restart on another machine, so the run itself has to be unfinished."""
    resumes, launched = torchrun_run
    of_two = {"TORCHELASTIC_RUN_ID": "one", "WORLD_SIZE": 2, "RANK": 0, "LOCAL_WORLD_SIZE": 1}
    launched("one")
    assert not resumes(**of_two)
    launched("one", complete=False)
    assert resumes(**of_two)
    assert not resumes(**of_two | {"TORCHELASTIC_RUN_ID": "two"})
    launched("none", complete=False)
    assert not resumes(**of_two | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 1})


def test_a_directory_without_locks_is_used_and_said_once(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with RunDirectory(tmp_path / "run").lock():
        pass
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_directory_is_that_of_one_process(tmp_path):
    """A forked copy neither gets its lock nor clears it away after a refused run."""
    lock = RunDirectory(tmp_path / "run").lock()
    lock.__enter__()
    copy = os.fork()
    if copy == 0:
        try:
            RunDirectory(tmp_path / "run").lock().__enter__()
        except UserError as error:
            lock.__exit__(None, None, None)
            os._exit("another run" not in str(error))
        finally:  # nothing of the copy goes on in pytest
            os._exit(1)
    assert os.waitpid(copy, 0)[1] == 0
    assert (tmp_path / "run" / ".lock").exists()
    lock.__exit__(None, None, None)
    assert not (tmp_path / "run").exists()


def test_a_closed_data_root_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"--data-root {re.escape(str(tmp_path))} may not be entered"):
        find_data_set(parse("GE", ["--data-root", str(tmp_path)]).settings(), 32)


def test_restarts_over_several_machines_need_a_store_of_their_own(monkeypatch):
    agent = {
        "WORLD_SIZE": 2,
        "RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "TORCHELASTIC_MAX_RESTARTS": 1,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    for name, value in agent.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), process_group(None):
        pass


@forks
def test_a_full_disk_under_the_output_ends_no_training(tmp_path):
    result = train(tmp_path, stdout=Path("/dev/full"))
    assert (result.statuses, result.errors) == ([0], "")
    assert (tmp_path / "run" / "anytime.csv").exists()


def interrupt():
    signal.raise_signal(signal.SIGTERM)


def interrupt_unnoticed():
    """In a callback, whose exceptions Python drops; PyTorch has many while it compiles."""
    with contextlib.suppress(Interrupted):
        interrupt()


@pytest.mark.parametrize(
    ("first_step", "status", "words"),
    [
        (
            interrupt,
            143,
            "what was saved before stays; to resume: python train_GE.py",
        ),  # compiling takes minutes
        (interrupt_unnoticed, 143, "after step 1 of 4, saved; to resume: python train_GE.py"),
        (RuntimeError("CUDA error: out of memory"), 2, "not enough memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            2,
            "not enough memory",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, "not enough memory"),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1"),
            1,
            "another process of this run was lost",
        ),
    ],
)
def test_what_ends_the_step_that_compiles_ends_the_run_with_one_line(
    tmp_path, tiny_demo, monkeypatch, capsys, first_step, status, words
):
    def run_it(objective, *batch):
        if isinstance(first_step, Exception):
            raise first_step
        first_step()
        return objective(*batch)

    def compile(function, mode):
        return partial(run_it, function) if isinstance(function, torch.nn.Module) else function

    monkeypatch.setattr(torch, "compile", compile)
    assert train_GE.main([*TINY_FLAGS, "--compile", "default", "--save", str(tmp_path / "run")]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (tmp_path / "run" / "last.pt").exists() is ("after step" in line)


def train_with_ignored_children(argv):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return disturbed.main(argv)


@forks
def test_a_process_that_ignores_the_end_of_its_children(tmp_path):
    """As some supervisors start it: the system then keeps no exit status of a worker."""
    ended = forkserver.run(
        train_with_ignored_children, ["--save", "run", *TINY_FLAGS], tmp_path, {"PROCESSES": 2}
    )
    assert (ended.statuses, ended.errors) == ([0], "")


@forks
def test_resuming_nothing_trains_in_as_many_processes(tmp_path):
    result = train(tmp_path, "--resume")
    assert result.statuses == [0], result.errors
    assert "nothing to resume" in result.output
    assert "2 processes" in result.output
