"""Checkpoints are checked entry by entry before anything is done with them."""

from dataclasses import asdict

import pytest
import torch

from datasets import DataInfo
from engine.checkpoint import load_checkpoint, load_saved, network_config, save_checkpoint
from engine.validation import describe_network
from models import IMTA, MSDNet
from tests.conftest import TINY_NETWORK
from utils import UserError


@pytest.fixture
def state():
    network = IMTA(MSDNet(**TINY_NETWORK))
    info = DataInfo("demo", [str(c) for c in range(10)], 32, [0.5] * 3, [0.25] * 3, 100, "0" * 16)
    return {
        **{"stage": "IMTA", "title": "test", "origin": None, "network": network_config(network), "state_dict": network.state_dict()},
        **{"data": asdict(info), "held_out": torch.arange(3), "settings": {"data": "demo", "lr": 0.1, "growth_factors": [1, 2, 4]}},
    }


def test_a_sound_state_is_read(state, tmp_path):
    save_checkpoint(tmp_path / "best.pt", state)
    assert load_checkpoint(tmp_path / "best.pt").keys() == {"format", *state}


@pytest.mark.parametrize(
    ("trail", "value"),
    [
        (("stage",), "stage 3"),
        (("title",), None),
        (("origin",), 3),
        (("network", "backbone", "num_blocks"), 10**9),
        (("network", "backbone", "num_channels"), "x"),
        (("network", "backbone", "growth_factors"), [1, 2.5]),
        (("state_dict", "classifiers.0.bias"), torch.zeros(1).expand(10**10)),
        (("state_dict", "classifiers.0.bias"), [0.0]),
        (("data", "class_names"), ["one"]),
        (("data", "std"), [0.5, 0.5, float("nan")]),
        (("data", "image_size"), 10**9),
        (("held_out",), torch.tensor([2, 1])),
        (("held_out",), torch.tensor([100])),
        (("settings", "lr"), "0.1"),
        (("settings", "lr"), -1.0),
        (("settings", "growth_factors"), "1-2-4"),
        (("settings", "data"), "mnist"),
        (("epoch",), 10**6),
        (("history",), [{"epoch": torch.zeros(1)}]),
        (("optimizer",), {"state": {}, "param_groups": []}),
        (("random_state",), torch.zeros(3, dtype=torch.uint8)),
        (("step",), -1),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(state, tmp_path, trail, value):
    *above, name = trail
    holder = state
    for key in above:
        holder = holder[key]
    holder[name] = value
    save_checkpoint(tmp_path / "best.pt", state)
    for load in (load_checkpoint, lambda path: load_saved(path, {})):
        with pytest.raises(UserError, match=r"best\.pt is damaged") as raised:
            load(tmp_path / "best.pt")
        message = str(raised.value)
        assert "\n" not in message
        assert name in message or name in ("class_names", "optimizer")


def test_a_flipped_bit_is_noticed(state, tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, state)
    content = bytearray(path.read_bytes())
    place = content.index(state["state_dict"]["classifiers.0.weight"].numpy().tobytes()) + 5
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(path)


def test_a_description_of_no_network():
    with pytest.raises(ValueError, match="unknown type"):
        describe_network({"type": "ResNet"})
