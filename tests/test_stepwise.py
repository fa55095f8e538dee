"""Exit-by-exit evaluation gives what the full pass gives, whichever images leave."""

import pytest
import torch

from models import IMTA, MSDNet, Stepwise
from tests.conftest import TINY_NETWORK
from tests.test_msdnet import VARIANTS, images_for


@pytest.mark.parametrize("options", VARIANTS)
def test_same_logits_as_the_full_pass(options):
    network = MSDNet(**{**TINY_NETWORK, **options}).eval()
    images = images_for(network)
    run = Stepwise(network, images)
    for expected in network(images):
        torch.testing.assert_close(run.next_logits(), expected)
    with pytest.raises(IndexError):
        run.next_logits()


def test_images_that_leave_do_not_change_the_others():
    network = IMTA(MSDNet(**{**TINY_NETWORK, "num_blocks": 5})).double().eval()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    everything = network(images)
    run, here = Stepwise(network, images), torch.arange(8)
    for k in range(5):
        torch.testing.assert_close(run.next_logits(), everything[k][here])
        stays = torch.ones(len(here), dtype=torch.bool)
        stays[k % len(here)] = False
        run.keep(stays)
        here = here[stays]


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        Stepwise(MSDNet(**TINY_NETWORK).train(), torch.randn(1, 3, 32, 32))
