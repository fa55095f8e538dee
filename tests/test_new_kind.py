"""A kind of network that a user adds, as ``models.network`` says: trained, taken to stage 2, and used."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
from torch import Tensor, nn

import predict
import train_GE
import train_IMTA
from args import DEFAULTS, OWN_NETWORKS, OwnNetwork, all_option_names
from models import IMTA, ExitNetwork, State, load
from models.network import checked_num_exits

SHORT = ["--epochs", "1", "--batch-size", "8", "--amp", "off", "--workers", "0"]


@dataclass(frozen=True)
class TowerOptions:
    """Architecture of a ``Tower``."""

    depth: int = 3
    tower_width: int = 8


class Tower(ExitNetwork):
    """Convolutions in a row, each with an exit, without Gradient Equilibrium."""

    def __init__(self, num_classes: int, depth: int, tower_width: int):
        super().__init__()
        self.config = {"num_classes": num_classes, "depth": depth, "tower_width": tower_width}
        self.num_exits, self.num_classes, self.feature_dims = depth, num_classes, (tower_width,) * depth
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(tower_width if k else 3, tower_width, 3, stride=2, padding=1), nn.ReLU())
            for k in range(depth)
        )
        self.exits = nn.ModuleList(nn.Linear(tower_width, num_classes) for _ in range(depth))

    def check_image_size(self, size: int) -> None:
        pass

    def start(self, images: Tensor) -> State:
        return {"x": images}

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        x = self.blocks[k](state["x"])
        return x.mean((2, 3)), {"x": x}

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        return self.exits[k](features)

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        features = []
        for block in self.blocks[: checked_num_exits(self, num_exits)]:
            images = block(images)
            features.append(images.mean((2, 3)))
        return features

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"exits.{name}", parameter) for name, parameter in self.exits.named_parameters())


@pytest.fixture
def tower(monkeypatch, image_folder):
    """Let --arch tower name the new kind; return flags of a short training of it on ``image_folder``."""
    monkeypatch.setitem(OWN_NETWORKS, "tower", OwnNetwork("Tower", TowerOptions))
    for name, value in asdict(TowerOptions()).items():  # in ``args``, OWN_NETWORKS brings them along
        monkeypatch.setitem(DEFAULTS, name, value)
    data = ["--data-root", str(image_folder), "--image-size", "32", "--val-size", "12"]
    return [*data, *SHORT, "--arch", "tower"]


def test_trained_taken_to_stage_2_and_used(tower, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DEFAULTS, "tower_width", 6)
    assert train_GE.main([*tower, "--save", str(tmp_path / "GE")]) == 0
    monkeypatch.setitem(DEFAULTS, "tower_width", 5)  # stage 2 takes the network's own options
    assert train_IMTA.main(["--pretrained", str(tmp_path / "GE"), *SHORT]) == 0
    network = load(tmp_path / "IMTA")
    assert isinstance(network, IMTA)
    assert network.backbone.config == {"num_classes": 3, "depth": 3, "tower_width": 6}
    for stage in ("GE", "IMTA"):
        settings = json.loads((tmp_path / stage / "run.json").read_text())["settings"]
        options = {name: settings[name] for name in settings.keys() & all_option_names()}
        assert options == {"depth": 3, "tower_width": 6}, stage
    photo = next((image_folder / "test" / "ant").glob("*.png"))
    capsys.readouterr()
    assert predict.main([str(photo), "--model", str(tmp_path / "IMTA")]) == 0
    assert str(photo) in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--boosted-exits", "--no-GE", "--nBlocks=3", "--exits=3"])
def test_options_of_other_kinds_are_refused(tower, tmp_path, capsys, flag):
    assert train_GE.main([*tower, flag, "--save", str(tmp_path / "GE")]) == 2
    assert "not for --arch tower" in capsys.readouterr().err
