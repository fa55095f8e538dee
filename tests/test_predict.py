"""predict.py: answers in three formats, budgets, and files that cannot be read."""

import csv
import io
import json
import os

import pytest
import torch
from PIL import Image

import predict
from adaptive_inference.policies import confidence_by_exit, policy_curve, write_policy
from models import IMTA, MSDNet, count_operations
from models.saved import Split, save_network
from tests.conftest import TINY_NETWORK, describe

CLASS_NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with a policy file beside it: point p lets about p tenths of all images leave at the first exit."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    network = IMTA(MSDNet(**TINY_NETWORK)).eval()
    save_network(folder / "best.safetensors", network, describe(network), Split(torch.arange(3), torch.empty(0, dtype=torch.int64)))
    with torch.no_grad():
        confidence, _ = confidence_by_exit(torch.stack(network(torch.randn(50, 3, 32, 32))))
    operations = count_operations(network, 32)
    rows = [
        {
            "p": p,
            "thresholds": [confidence[0].quantile(1 - p / 10).item(), 1e8, -1e8],
            "val_acc": 90.0 - p,
            "val_flops": operations[0] * p / 10 + operations[2] * (1 - p / 10),
        }
        for p in (10, 5, 1)
    ]
    write_policy(folder / "policy.json", policy_curve(network, operations, {"geometric": rows}))
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    for i, name in enumerate(["a.png", "b.png", "deeper/c.jpg", "d.webp"]):
        pixels = torch.randint(256, (40 + i, 50, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(trained, *arguments):
    return predict.main(["--checkpoint", str(trained / "best.safetensors"), "--device", "cpu", *map(str, arguments)])


def test_formats_agree(trained, images, capsys):
    assert run(trained, images, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"].removeprefix(f"{images}/") for row in rows] == ["a.png", "b.png", "d.webp", "deeper/c.jpg"]
    for row in rows:
        assert row["class"] in CLASS_NAMES
        assert 0 < row["confidence"] <= 1
        assert row["exit"] in (1, 3)
        assert row["operations"] > 0
        assert row["milliseconds"] > 0
    assert run(trained, images, "--format", "csv", "--batch-size", "1") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = ("file", "class", "exit", "operations")
    assert [[row[name] for name in names] for row in table] == [[str(row[name]) for name in names] for row in rows]
    assert run(trained, images) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_output_file(trained, images, tmp_path, capsys):
    assert run(trained, images / "a.png", "--format", "csv", "--output", tmp_path / "new" / "answers.csv") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "new" / "answers.csv").read_text().startswith("file,class,confidence,exit,operations,milliseconds\n")


def test_budget_decides_how_deep(trained, images, capsys):
    exits = []
    for budget in ("100%", "60%"):
        run(trained, images, "--budget", budget, "--format", "json")
        exits.append([row["exit"] for row in json.loads(capsys.readouterr().out)])
    assert sum(exits[0]) >= sum(exits[1])
    assert run(trained, images, "--budget", "0.000001") == 2
    assert "cheapest policy" in capsys.readouterr().err


def test_unreadable_files_are_named_and_skipped(trained, images, capsys):
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    assert run(trained, images, images / "missing.png", "--format", "json") == 1
    output = capsys.readouterr()
    assert len(json.loads(output.out)) == 4
    errors = output.err.splitlines()
    assert errors[0].endswith("left out: 1 .txt")
    assert "broken.png" in errors[1]
    assert "missing.png" in errors[2]


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_empty_folder(trained, tmp_path, capsys, format):
    (tmp_path / "empty").mkdir()
    assert run(trained, tmp_path / "empty", "--format", format) == 1
    assert "empty holds no image" in capsys.readouterr().err


def test_mistakes(trained, images, tmp_path, capsys):
    assert predict.main([str(images), "--checkpoint", str(tmp_path / "missing.pt")]) == 2
    assert run(trained, images, "--policy", tmp_path / "missing.json") == 2
    other = MSDNet(**TINY_NETWORK)
    rows = [{"p": 1, "thresholds": [0.5, 0.5, 0.5], "val_acc": 50.0, "val_flops": 1.0}]
    write_policy(tmp_path / "other.json", policy_curve(other, [1, 2, 3], {"geometric": rows}))
    assert run(trained, images, "--policy", tmp_path / "other.json") == 2
    assert run(trained, images, "--device", "no-such-device") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    for line, expected in zip(errors, ("no checkpoint", "no policy file", "policy of another network", "--device"), strict=True):
        assert line.startswith("predict.py: ")
        assert expected in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        *(["x", "--budget", budget] for budget in ("nan", "-3", "200%")),
        ["x", "--batch-size", "0"],
        ["x", "--format", "xml"],
    ],
)
def test_command_lines_that_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(arguments)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def exits_of(trained, images, capsys, *flags):
    assert predict.main([str(images), "--checkpoint", str(trained / "best.safetensors"), "--format", "json", *flags]) == 0
    return [row["exit"] for row in json.loads(capsys.readouterr().out)]


def test_wanted_accuracy_and_points_choose_policies(trained, images, capsys):
    """Point 1 is the most accurate one here, and point 10 the cheapest."""
    first, last = exits_of(trained, images, capsys, "--point", "1"), exits_of(trained, images, capsys, "--point", "10")
    assert exits_of(trained, images, capsys, "--accuracy", "88.5") == first
    assert exits_of(trained, images, capsys, "--accuracy", "75%") == last
    assert sum(last) <= sum(first)
    for flags, message in (
        (["--accuracy", "95"], "reaches 95 %"),
        (["--point", "2"], "no point 2"),
        (["--rule", "optimised"], "optimised"),
    ):
        assert predict.main([str(images), "--checkpoint", str(trained / "best.safetensors"), *flags]) == 2
        assert message in capsys.readouterr().err


def test_what_is_no_file_is_skipped_at_once(trained, images, tmp_path, capsys):
    """A pipe that nobody writes into, and a line of pixels that resizing would make enormous."""
    os.mkfifo(images / "pipe.png")
    Image.new("RGB", (40_000, 2)).save(images / "line.png")
    assert predict.main([str(images / "pipe.png"), str(images / "line.png"), "--checkpoint", str(trained / "best.safetensors")]) == 1
    errors = capsys.readouterr().err
    assert "pipe.png: there is no such file; skipped" in errors
    assert "differ too much; skipped" in errors


def test_output_into_a_device_leaves_it_one(trained, images, tmp_path):
    device = tmp_path / "null"
    device.symlink_to(os.devnull)
    assert predict.main([str(images), "--checkpoint", str(trained / "best.safetensors"), "--output", str(device)]) in (0, 1)
    assert device.is_char_device()
    assert device.is_symlink()
