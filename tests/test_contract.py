"""Every kind of network keeps the contract of ``ExitNetwork``; ``tests.contract`` says what that is."""

import pytest

from tests import contract

# One or two networks of every kind; ``python -m tests.contract``, which CI calls, checks all.
NAMES = ("msdnet", "msdnet_boosted", "imta", "imta_single_stage", "imta_backbone", "chain", "vit")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "check", [check for check in contract.CHECKS if check != "onnx"]
)  # see test_export.py
def test_network(check, name):
    if reason := contract.CHECKS[check](contract.CASES[name]):
        pytest.skip(reason)


def test_command_line(capsys, monkeypatch):
    broken = contract.Case(lambda: contract.msdnet(num_blocks=0))
    monkeypatch.setitem(contract.CASES, "broken", broken)
    monkeypatch.delitem(contract.CHECKS, "onnx")  # slow
    assert contract.main(["msdnet_one_exit"]) == 0
    assert contract.main(["broken"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["msdnet_one_exit", "ok"]
    assert "num_blocks is 0" in lines[1]
    with pytest.raises(SystemExit):
        contract.main(["nothing"])
    assert "there are msdnet, " in capsys.readouterr().err
