"""The commands of the README as processes: both launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.report import read_csv
from presets import PRESETS
from tests.conftest import TINY_FLAGS

ROOT = Path(__file__).parent.parent


def run(command, folder, **environment):
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def test_launchers_know_the_presets_and_refuse_others_before_the_set_up(tmp_path):
    for words in (["cifar10O"], ["--preset", "cifar100"]):
        refused = run(["bash", ROOT / "run_GE.sh", *words], tmp_path, PYTHON="no-such-python")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert set(refused.stderr.split("the preset: ")[1].strip().split(", ")) == set(PRESETS)


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path):
    """A read-only checkout, where no .venv can be made."""
    (tmp_path / "file").write_text("no folder")
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    refused = run(
        ["bash", ROOT / "run_GE.sh"],
        tmp_path,
        PYTHON=str(empty / "bin/python"),
        VENV=str(tmp_path / "file/.venv"),
    )
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "VENV=" in refused.stderr


def executable(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_a_half_made_environment_is_completed(tmp_path):
    """As ``python -m venv`` leaves it without ensurepip."""
    executable(tmp_path / "env/bin/python", "exit 1")
    executable(tmp_path / "whole", 'echo "$*"')
    base = executable(
        tmp_path / "python",
        "[[ $1 != - ]] || exit 1",  # lacks the requirements
        '[[ $1 != -m ]] || cp "${0%/*}/whole" "$3/bin/python"',
    )
    ended = run(["bash", ROOT / "run_GE.sh"], tmp_path, PYTHON=base, VENV=str(tmp_path / "env"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[1:] == [
        f"-m pip install --requirement {ROOT}/requirements.txt",
        f"{ROOT}/train_GE.py --preset demo --save save/demo/GE",
    ]


def test_an_environment_whose_python_has_gone_is_made_again(tmp_path):
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (environment / "bin/python").unlink()
    (environment / "bin/python").symlink_to(tmp_path / "gone")
    base = executable(
        tmp_path / "python",
        "[[ $1 != - ]] || exit 1",
        f'[[ $1 != -m ]] || exec {sys.executable} "$1" "$2" --without-pip "${{@:3}}"',
    )
    ended = run(["bash", ROOT / "run_GE.sh"], tmp_path, PYTHON=base, VENV=str(environment))
    assert "No module named pip" in ended.stderr
    assert (environment / "bin/python").resolve() == Path(sys.executable).resolve()


def test_a_folder_that_is_no_environment_keeps_its_files(tmp_path):
    """As ``VENV=~/.local``, where other tools keep a ``python3.12`` but no ``python``."""
    other = Path(executable(tmp_path / "env/bin/python3.12", "exit 0"))
    base = executable(tmp_path / "python", '[[ $1 == -c ]] && exit 0; echo "$1" >&2; exit 1')
    ended = run(["bash", ROOT / "run_GE.sh"], tmp_path, PYTHON=base, VENV=str(tmp_path / "env"))
    assert ended.returncode == 2
    assert other.exists()


def test_a_finished_environment_is_used_whatever_python3_is(tmp_path):
    executable(tmp_path / "env/bin/python", '[[ $1 == - ]] || echo "$1"')
    old = executable(tmp_path / "python", "exit 1")
    ended = run(["bash", ROOT / "run_GE.sh"], tmp_path, PYTHON=old, VENV=str(tmp_path / "env"))
    assert (ended.returncode, ended.stdout) == (0, f"{ROOT}/train_GE.py\n")


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        ([], {}, ["--preset", "demo", "--save", "save/demo/{}"]),
        (["--lr", "0.1"], {}, ["--preset", "demo", "--save", "save/demo/{}", "--lr", "0.1"]),
        (
            ["folder", "--exits", "1 2"],
            {"DATA_ROOT": "my images", "GPUS": "0,1", "SAVE": "my runs"},
            [
                *("--preset", "folder", "--data-root", "my images", "--gpu", "0,1"),
                *("--save", "my runs/{}", "--exits", "1 2"),
            ],
        ),
    ],
)
def test_launchers_pass_on_words_and_variables(tmp_path, stage, words, variables, expected):
    python = executable(tmp_path / "python", '[[ $1 == - || $1 == -c ]] || printf "%s\\n" "$@"')
    ended = run(["bash", ROOT / f"run_{stage}.sh", *words], tmp_path, PYTHON=python, **variables)
    assert ended.returncode == 0, ended.stderr
    program, *passed = ended.stdout.splitlines()
    assert program == str(ROOT / f"train_{stage}.py")
    assert passed == [word.format(stage) for word in expected]


# Ends the program that is imported where PyTorch would be loaded.
UNTIL_TORCH = """
import importlib, os, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(os.environ.get("OMP_WAIT_POLICY", "not set"))
sys.meta_path.insert(0, NoTorch())
importlib.import_module(sys.argv[1])
"""


PROGRAMS = (
    "train_GE",
    "train_IMTA",
    "predict",
    "export_onnx",
    "engine.convert",
    "experiments.ship",
    "experiments.drift",
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_do_not_spin_unless_the_user_wants_it(program):
    """Beside a busy core they would make everything many times slower; later than this it has no effect."""
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        command = [sys.executable, "-c", UNTIL_TORCH, program]
        ended = subprocess.run(
            command, cwd=ROOT, env=environment | given, capture_output=True, text=True, check=False
        )
        assert ended.stderr.strip() == expected


def test_a_home_in_quotes_is_expanded_for_the_environment_too(tmp_path):
    """``VENV="~/env"``; the shell expands ~ only outside of quotes."""
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    (tmp_path / "env").write_text("no folder")
    refused = run(
        ["bash", ROOT / "run_GE.sh"],
        tmp_path,
        PYTHON=str(empty / "bin/python"),
        VENV="~/env",
        HOME=str(tmp_path),
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"cannot write {tmp_path / 'env'};")


def test_the_tests_run_from_another_folder_with_a_relative_python(tmp_path):
    """Also with ``VENV=env``; the script goes to the project's folder."""
    executable(tmp_path / "env/bin/python", 'echo "$@"')
    ended = run(["bash", ROOT / "run_tests.sh", "-m", "slow"], tmp_path, PYTHON="env/bin/python")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == "-m pytest -m slow"


@pytest.mark.slow
def test_launchers_end_to_end(tmp_path, image_folder):
    """From another directory, as a user would."""
    small = [*TINY_FLAGS, "--image-size", "32", "--val-size", "12", "--batch-size", "16"]
    stage_1 = run(["bash", ROOT / "run_GE.sh", "folder", *small], tmp_path, DATA_ROOT=str(image_folder))
    assert stage_1.returncode == 0, stage_1.stderr
    stage_2 = run(["bash", ROOT / "run_IMTA.sh", "folder", "--epochs", "1", "--batch-size", "16"], tmp_path)
    assert stage_2.returncode == 0, stage_2.stderr
    for stage, output in (("GE", stage_1.stdout), ("IMTA", stage_2.stdout)):
        assert "every exit on the 15 test images" in output
        assert len(read_csv(tmp_path / "save" / "folder" / stage / "anytime.csv")) == 3
        assert len(read_csv(tmp_path / "save" / "folder" / stage / "budgeted.csv")) == 40
