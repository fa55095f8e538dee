"""Tools of every program: paths with ``~``, cores that a container grants, lines, atomic files."""

import argparse
import io
import math
import sys
from pathlib import Path

import pytest

from utils import CommandLineParser, UserError, atomic_write, available_cores, one_line, print_line, user_path


@pytest.mark.parametrize("text", ["~/net", "~no-such-user/net", "a/~/net", "~"])
def test_home_is_expanded_where_there_is_one(monkeypatch, tmp_path, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"~/net": tmp_path / "net", "~": tmp_path}.get(text, Path(text))
    assert user_path(text) == expected
    with pytest.raises(argparse.ArgumentTypeError):
        user_path("")


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/not/visible/here\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "a few"}, math.inf),
        ("3:cpu,cpuacct:/\n1:memory:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, math.inf),
        (
            "3:cpu,cpuacct:/docker/1\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        ("", {}, math.inf),
    ],
)
def test_a_containers_quota_counts_as_cores(tmp_path, groups, files, cores):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    nothing_limits = available_cores(tmp_path / "elsewhere")
    assert available_cores(tmp_path) == min(cores, nothing_limits)


def test_a_mistyped_flag_is_answered_with_the_right_one(capsys):
    parser = CommandLineParser(prog="program.py", allow_abbrev=False)
    parser.add_argument("--epochs")
    for typed in ("--epoch", "--epoch=3"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([typed])
        assert ended.value.code == 2
        assert "did you mean --epochs?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--zzz"])
    assert "did you mean" not in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print_line("Zo\u00eb/caf\udce9.jpg")
    assert sys.stdout.buffer.getvalue() == b"Zo\\xeb/caf\\udce9.jpg\n"


def test_messages_are_one_line_of_limited_length():
    assert one_line("a\nb\x1b[0m") == "a b?[0m"
    assert len(one_line("x" * 10_000)) < 1000


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as stream:
        stream.write("old")

    def write_half() -> None:
        with atomic_write(path) as stream:
            stream.write("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path):
        pass
