"""Tools of every program: cores that a container grants, lines, atomic files."""

import io
import math
import os
import sys

import pytest

from utils import UserError, atomic_write, available_cores, one_line, print_line


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
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
def test_a_containers_quota_counts_as_cores(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_cores(tmp_path) == min(cores, 16)


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
