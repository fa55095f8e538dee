"""The parser of every program: a mistyped flag, and paths with ``~``."""

import argparse
from pathlib import Path

import pytest

from parsing import CommandLineParser, user_path


@pytest.mark.parametrize("text", ["~/net", "~no-such-user/net", "a/~/net", "~"])
def test_home_is_expanded_where_there_is_one(monkeypatch, tmp_path, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"~/net": tmp_path / "net", "~": tmp_path}.get(text, Path(text))
    assert user_path(text) == expected
    with pytest.raises(argparse.ArgumentTypeError):
        user_path("")


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
