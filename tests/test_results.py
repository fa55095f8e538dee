"""The tables of the README are those of the files they are made from, and the runs that make these are commands of the programs."""

from pathlib import Path

import pytest

from args import parse
from results import arms, tables


def test_readme_agrees_with_the_result_files():
    text = tables.README.read_text(encoding="utf-8")
    assert all(f"<!-- table {name} -->" in text for name in tables.TABLES)
    assert tables.with_tables(text) == text
    assert tables.with_tables(text.replace("| 1 | 6.86 M |", "| 1 | 0.00 M |")) == text


def test_spread_is_the_sample_standard_deviation():
    assert tables.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert tables.spread([1.0, 3.0], "+") == "+2.00 ± 1.41 (n = 2)"
    assert tables.spread([]) == ""


@pytest.mark.parametrize("schedule", arms.SCHEDULES.values(), ids=arms.SCHEDULES)
@pytest.mark.parametrize("arm", arms.ARMS)
def test_commands_of_the_arms_are_understood(arm, schedule):
    program, *flags = arms.command(arm, schedule, 2, Path("data"), Path("work"))
    command = parse(program.removeprefix("train_").removesuffix(".py"), flags)
    assert command.settings().seed == 2
    assert command.save_directory == Path("work/seed_2") / arm
