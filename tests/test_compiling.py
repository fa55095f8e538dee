"""A machine that cannot compile: ``--compile auto`` trains without, an explicit mode ends with one line."""

import logging
import shutil
from inspect import signature
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import models
import train_GE
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.runtime.compiling import compiler_problem, reason_of, usable_mode
from engine.runtime.distributed import Processes
from engine.stepper import _compiled
from settings.command_line import parse
from tests.conftest import TINY_FLAGS
from utils import UserError

CPU = Processes(0, 1, torch.device("cpu"), ())


class OtherFails(NamedTuple):
    """Processes of which another one cannot compile."""

    device: torch.device = torch.device("cpu")

    def all_reduce_max(self, value: int) -> int:
        """Return what the other process said."""
        return 1


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("setting up\nCppCompileError: C++ compile error: g++: no such file\nmore")

    monkeypatch.setattr(torch, "compile", fail)


def test_a_mode_that_nobody_typed_is_left_with_one_line(no_compiler):
    lines = []
    assert usable_mode("default", False, CPU, lines.append) == "off"
    assert len(lines) == 1
    assert "g++: no such file" in lines[0]


def test_the_reason_is_what_the_compiler_says():
    text = (
        "CppCompileError: C++ compile error\nOutput:\na.h: fatal error: x\nclosing b: No space left on device"
    )
    assert reason_of(RuntimeError(text)) == "closing b: No space left on device"
    assert reason_of(RuntimeError(text.rsplit("\n", 1)[0])) == "a.h: fatal error: x"


def test_a_mode_that_was_typed_is_refused(no_compiler):
    with pytest.raises(UserError, match=r"--compile default does not work here: .*g\+\+"):
        usable_mode("default", True, CPU, print)
    assert usable_mode("off", True, CPU, print) == "off"


def test_all_processes_train_without_where_one_cannot_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    lines = []
    assert usable_mode("default", False, CPU, lines.append) == "default"
    assert usable_mode("default", False, OtherFails(), lines.append) == "off"
    assert lines == ["training is not compiled, which would make it faster: it fails in another process"]


def test_a_trial_leaves_the_loggers_as_they_are(no_compiler):
    logger = logging.getLogger("torch._dynamo")
    before = logger.level
    assert "no such file" in compiler_problem(torch.device("cpu"))
    assert logger.level == before


def test_the_step_is_one_graph_with_several_processes():
    """Older versions of PyTorch compute wrong gradients where Dynamo splits it for their exchange."""
    torch._dynamo.config.optimize_ddp = True
    settings = parse("GE", ["--compile", "default"]).settings()
    _compiled(torch.nn.Linear(1, 1), settings)
    assert torch._dynamo.config.optimize_ddp is False


def test_nothing_is_trained_or_removed_before_the_compiler_was_tried(
    tmp_path, tiny_demo, no_compiler, capsys
):
    command = [*TINY_FLAGS, "--compile", "default", "--save", str(tmp_path / "run")]
    assert train_GE.main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_compiled_run_can_be_resumed_without_a_compiler():
    stored = vars(parse("GE", ["--compile", "default"]).settings())
    command = parse("GE", ["--resume", "--compile", "off"])
    command.refuse_changes(stored)
    assert command.settings(stored).compile == "off"
    assert parse("GE", ["--resume"]).settings(stored).compile == "default"


def test_a_run_that_auto_compiled_is_resumed_without_a_compiler(
    finished, tiny_demo, tmp_path, no_compiler, capsys
):
    """Its recipe has the mode that ``auto`` chose, which nobody requested."""
    shutil.copytree(finished / "GE", tmp_path / "GE")
    last = tmp_path / "GE" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["description"]["recipe"]["compile"] = "default"
    save_checkpoint(last, checkpoint)
    resumed = ["--save", str(tmp_path / "GE"), "--resume"]
    assert train_GE.main([*resumed, "--compile", "default"]) == 2
    assert "--compile default does not work here" in capsys.readouterr().err
    assert train_GE.main(resumed) == 0
    assert "training is not compiled, which would make it faster" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "default"])
def test_the_first_step_that_cannot_be_compiled(tmp_path, tiny_demo, monkeypatch, capsys, mode):
    """The disk is full after the small test, say: ``auto`` trains on, to the same weights as without."""
    monkeypatch.setattr("engine.auto.COMPILING_PAYS", 0.0)
    small_ones = torch.compile

    def compile(function, mode):
        return Failing() if isinstance(function, torch.nn.Module) else function

    class Failing(torch.nn.Module):
        def forward(self, *_):
            full = OSError(28, "No space left on device")
            newer = [None] * ("first_useful_frame" in signature(BackendCompilerFailed).parameters)
            raise BackendCompilerFailed(small_ones, full, *newer)

    monkeypatch.setattr(torch, "compile", compile)
    command = [*TINY_FLAGS, "--save"]
    status = train_GE.main([*command, str(tmp_path / "run"), "--compile", mode])
    printed = capsys.readouterr()
    if mode == "default":
        assert status == 2
        (line,) = printed.err.splitlines()
        assert "cannot be compiled" in line
        assert "No space left" in line
        return
    assert (status, printed.err) == (0, "")
    (line,) = [line for line in printed.out.splitlines() if "without compiled code" in line]
    assert "No space left" in line
    assert load_checkpoint(tmp_path / "run" / "last.pt")["description"].recipe["compile"] == "off"
    assert train_GE.main([*command, str(tmp_path / "eager"), "--compile", "off"]) == 0
    weights = [models.load(tmp_path / name).state_dict() for name in ("run", "eager")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])
