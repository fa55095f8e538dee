"""Every kind of network keeps the contract of ``ExitNetwork``; ``tests.contract`` says what that is."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor, nn

from models import MSDNet
from tests import contract

# One or two networks of every kind; ``python -m tests.contract``, which CI calls, checks all.
NAMES = ("msdnet", "msdnet_boosted", "imta", "imta_single_stage", "imta_backbone", "chain", "vit")


# Checks that do not apply to a network: GE is not on all that passes between the blocks of a frozen stage 1,
# a custom network cannot be rebuilt for other classes, and only a Backbone was cut from a network.
NOT_APPLICABLE = {
    "gradient_equilibrium": {"imta", "imta_backbone"},
    "other_classes": {"imta_backbone", "chain", "vit"},
    "uncut": {"msdnet", "msdnet_boosted", "imta", "imta_single_stage", "imta_backbone"},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "check", [check for check in contract.CHECKS if check != "onnx"]
)  # see test_export.py
def test_network(check, name):
    """A check that leaves itself out where it applies is a failure too."""
    reason = contract.CHECKS[check](contract.CASES[name])
    assert (reason is not None) == (name in NOT_APPLICABLE.get(check, ())), reason


@pytest.mark.parametrize("name", ["chain_new_classes", "imta_backbone_single_stage"])
def test_rebuilt_backbones_train_the_same_parameters(name):
    contract.check_rebuilt(contract.CASES[name])


class Unbiased(MSDNet, register=False):
    """An MSDNet whose classifiers have no bias."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        for exit_module in self.exits:
            exit_module.linear.register_parameter("bias", None)


def test_classifiers_of_networks_may_lack_a_bias():
    contract.check_parameter_lists(contract.Case(lambda: Unbiased(contract.NUM_CLASSES, num_blocks=2)))


class Unnamed(MSDNet, register=False):
    """An MSDNet that does not name the classifier of its last exit."""

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        last = f"exits.{self.num_exits - 1}."
        return (pair for pair in super().classifier_parameters() if not pair[0].startswith(last))


def test_every_exit_has_a_classifier():
    case = contract.Case(lambda: Unnamed(contract.NUM_CLASSES, num_blocks=2))
    with pytest.raises(AssertionError):
        contract.check_parameter_lists(case)


class Unscaled(MSDNet, register=False):
    """An MSDNet that declares Gradient Equilibrium, and leaves gradients as they are."""

    def rescale(self, x: Tensor, factor: float) -> Tensor:
        return x


def test_a_network_that_does_not_rescale_gets_a_line_that_says_what_to_do():
    case = contract.CASES["msdnet"]
    small = {"num_blocks": 3, "num_channels": 4, "growth_rate": 4, "step_mode": "lin_grow"}
    unscaled = replace(case, build=lambda: Unscaled(contract.NUM_CLASSES, **small))
    with pytest.raises(
        AssertionError, match=r"stem\.\S+ in block 0 .* sum / 3: features\(\) must call rescale"
    ):
        contract.check_gradient_equilibrium(unscaled)
    undeclared = replace(case, build=lambda: contract.msdnet(gradient_equilibrium=False))
    with pytest.raises(AssertionError, match="declare gradient_equilibrium = True in MSDNet"):
        contract.check_gradient_equilibrium(undeclared)


def test_command_line(capsys, monkeypatch):
    broken = contract.Case(lambda: contract.msdnet(num_blocks=0))
    monkeypatch.setitem(contract.CASES, "broken", broken)
    monkeypatch.delitem(contract.CHECKS, "onnx")  # slow
    assert contract.main(["msdnet_one_exit"]) == 0
    assert contract.main(["broken"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"msdnet_one_exit +ok\b", lines[0])
    assert "num_blocks is 0" in lines[1]
    with pytest.raises(SystemExit):
        contract.main(["nothing"])
    assert "there are msdnet, " in capsys.readouterr().err
