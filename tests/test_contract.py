"""Every kind of network keeps the contract of ``ExitNetwork``; ``tests.contract`` says what that is."""

import pytest

from tests import contract

# One or two networks of every kind; ``python -m tests.contract`` checks all.
NAMES = (
    "msdnet",
    "msdnet_boosted",
    "msdnet_large",
    "msdnet_one_exit",
    "imta",
    "imta_flowing_gradient",
    "imta_single_stage",
    "imta_backbone",
    "chain",
    "vit",
)


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
    assert contract.main(["imta_without_isc"]) == 0
    assert contract.main(["imta_without_isc", "broken"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["imta_without_isc", "ok"]] * 2
    assert "num_blocks is 0" in lines[2]
    with pytest.raises(SystemExit):
        contract.main(["nothing"])
    assert "there are msdnet, " in capsys.readouterr().err
